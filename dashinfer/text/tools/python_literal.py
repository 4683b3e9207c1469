"""`json_of`: a Python literal's JSON, for calls that are written as Python. Nothing is evaluated."""

import json
import re
from typing import Any

_MAX_DEPTH = 64
_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_NAMES = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-7]{1,3}|.)", re.DOTALL)
STRING = re.compile(
    r"[rR]?(?:'''(?:[^\\]|\\.)*?'''|\"\"\"(?:[^\\]|\\.)*?\"\"\"|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", re.DOTALL
)


def json_of(text: str) -> str:
    """JSON of a literal: strings, numbers, `True`, `None` and so on (and JSON's names for them), lists, tuples, dictionaries
    with strings for keys.

    Raises:
        ValueError: it is none of these.
    """
    value, end = _value(text, _skip(text, 0), 0)
    if _skip(text, end) != len(text):
        raise ValueError("more than one literal")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None, "no space is a match too"
    return match.end()


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if match := STRING.match(text, at):
        value = _unescaped(match[0])
        end = match.end()
        while following := STRING.match(text, _skip(text, end)):  # neighbours are one string
            value, end = value + _unescaped(following[0]), following.end()
        return value, end
    if match := _NUMBER.match(text, at):
        digits = match[0].replace("_", "")
        return (float(digits) if re.search(r"[.eE]", digits) else int(digits)), match.end()
    if match := _NAME.match(text, at):
        if match[0] not in _NAMES:
            raise ValueError("not a literal")
        return _NAMES[match[0]], match.end()
    opening = text[at : at + 1]
    if opening == "{":
        return _dictionary(text, at + 1, depth)
    if opening in ("[", "("):
        return _sequence(text, at + 1, depth, "]" if opening == "[" else ")")
    raise ValueError("not a literal")


def _sequence(text: str, at: int, depth: int, closing: str) -> tuple[list[Any], int]:
    items: list[Any] = []
    while not text.startswith(closing, at := _skip(text, at)):
        item, at = _value(text, at, depth + 1)
        items.append(item)
        at = _separated(text, at, closing)
    return items, at + 1


def _dictionary(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    items: dict[str, Any] = {}
    while not text.startswith("}", at := _skip(text, at)):
        key, at = _value(text, at, depth + 1)
        at = _skip(text, at)
        if not isinstance(key, str) or not text.startswith(":", at):
            raise ValueError("not a dictionary")
        items[key], at = _value(text, _skip(text, at + 1), depth + 1)
        at = _separated(text, at, "}")
    return items, at + 1


def _separated(text: str, at: int, closing: str) -> int:
    at = _skip(text, at)
    if text.startswith(",", at):
        return at + 1
    if not text.startswith(closing, at):
        raise ValueError("no comma")
    return at


def _unescaped(literal: str) -> str:
    raw = literal[0] in "rR"
    quoted = literal[1:] if raw else literal
    width = 3 if quoted[:3] in ("'''", '"""') and len(quoted) >= 6 else 1
    inner = quoted[width:-width]
    value = inner if raw else _ESCAPE.sub(_character, inner)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a character") from None
    return value


def _character(match: re.Match[str]) -> str:
    kind = match[1]
    if kind[0] in "xuU" and len(kind) > 1:
        code = int(kind[1:], 16)
        if code > 0x10FFFF:
            raise ValueError("no character")
        return chr(code)
    if kind.isdigit() and kind.isascii() and kind[0] in "01234567":
        return chr(int(kind, 8))
    # As in Python, a backslash before anything else is itself.
    return _ESCAPES.get(kind, kind if kind in "\\'\"" else match[0])
