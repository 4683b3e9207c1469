"""A server under measurement: where it is and what it is asked for."""

import json
from dataclasses import dataclass, field
from typing import Any


class BenchError(Exception):
    """The measurement cannot go on; the message is the one line a user sees."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One server.

    Attributes:
        label: its name in tables.
        url: base URL, such as http://127.0.0.1:8000/v1, without a slash at the end.
        model: name in requests; None asks the server for its first one.
        api_key: sent as a bearer token.
        body: fields added to each request, for what only this server understands.
    """

    label: str
    url: str
    model: str | None = None
    api_key: str | None = None
    body: dict[str, Any] = field(default_factory=dict)


def split_label(text: str) -> tuple[str, str]:
    """`label=rest` as a pair. Raises BenchError without a label or a rest."""
    label, separator, rest = text.partition("=")
    if not separator or not label or not rest:
        raise BenchError(f"{text!r} has no label; write LABEL=...")
    return label, rest


def parse_target(text: str, api_key: str | None = None) -> Target:
    """A target from `label=url` or `label=url=model`. Raises BenchError."""
    label, rest = split_label(text)
    url, _, model = rest.partition("=")
    if not url.startswith(("http://", "https://")):
        raise BenchError(f"{url!r} is not a URL; write LABEL=http://HOST:PORT/v1[=MODEL]")
    return Target(label=label, url=url.rstrip("/"), model=model or None, api_key=api_key)


def parse_body(text: str) -> tuple[str, dict[str, Any]]:
    """`label={"field": value}` as label and fields. Raises BenchError."""
    label, rest = split_label(text)
    try:
        body = json.loads(rest)
    except json.JSONDecodeError as error:
        raise BenchError(f"the body of {label!r} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BenchError(f"the body of {label!r} is not a JSON object")
    return label, body
