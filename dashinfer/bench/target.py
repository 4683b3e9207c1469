"""A server under measurement: where it is and what it is asked for."""

import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dashinfer.errors import BenchError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One server.

    Attributes:
        label: its name in tables.
        url: base URL, such as http://127.0.0.1:8000/v1, without a slash at the end.
        model: name in requests; None asks the server for its first one.
        api_key: sent as a bearer token.
        headers: sent with each request.
        body: fields added to each request, for what only this server understands.
    """

    label: str
    url: str
    model: str | None = None
    api_key: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)


def split_label(text: str) -> tuple[str, str]:
    """`label=rest` as a pair. Raises BenchError without a label or a rest."""
    label, separator, rest = text.partition("=")
    if not separator or not label or not rest:
        raise BenchError(f"{text!r} has no label; write LABEL=...")
    return label, rest


def base_url(text: str) -> str | None:
    """The URL without slashes at its end, and with `/v1` where it has no path; None for what is no HTTP URL."""
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    url = text.rstrip("/")
    return url if parts.path.strip("/") else f"{url}/v1"


def parse_target(text: str, api_key: str | None = None) -> Target:
    """A target from `label=url` or `label=url=model`. Raises BenchError."""
    label, rest = split_label(text)
    address, _, model = rest.partition("=")
    if (url := base_url(address)) is None:
        raise BenchError(f"{address!r} is not a URL; write LABEL=http://HOST:PORT/v1[=MODEL]")
    return Target(label=label, url=url, model=model or None, api_key=api_key)


def parse_body(text: str) -> tuple[str | None, dict[str, Any]]:
    """`label={"field": value}` as label and fields; no label (None) stands for all targets. Raises BenchError."""
    label, rest = (None, text) if text.lstrip().startswith("{") else split_label(text)
    whose = "--body" if label is None else f"the body of {label!r}"
    try:
        body = json.loads(rest)
    except json.JSONDecodeError as error:
        raise BenchError(f"{whose} is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BenchError(f"{whose} is not a JSON object")
    return label, body


def parse_header(text: str) -> tuple[str, str]:
    """`Name: value` as a pair. Raises BenchError."""
    name, separator, value = text.partition(":")
    if not separator or not name.strip():
        raise BenchError(f"{text!r} is not a header; write NAME:VALUE")
    return name.strip(), value.strip()
