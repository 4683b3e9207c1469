"""What the programs in this folder share. Each is one client, used as its documentation shows it, one function a use.

    python PROGRAM URL KEY [more]

prints, in its last line, a JSON object with an entry a function: {"got": what it returned} or {"failed": a traceback}.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import Any

URL, KEY, *WHICH = sys.argv[1:]
MODEL = "demo"
QUESTION = "What is the capital of France?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}

_uses: dict[str, Callable[[], Any]] = {}
_more: dict[str, Callable[[], Any]] = {}


def use(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register one."""
    _uses[function.__name__] = function
    return function


def more(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register one for `more`, which leaves out the others."""
    _more[function.__name__] = function
    return function


def error(function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
    """Of what a call raises, the names of its classes and the `status_code`."""
    try:
        found = function(*arguments, **named)
    except Exception as error:
        return [[kind.__name__ for kind in type(error).__mro__], getattr(error, "status_code", None)]
    raise AssertionError(f"no error, but {found!r}")


def main() -> None:
    results = {}
    for name, function in (_more if WHICH else _uses).items():
        try:
            results[name] = {"got": asyncio.run(function()) if iscoroutinefunction(function) else function()}
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    print("\n" + json.dumps(results))
