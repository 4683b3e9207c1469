"""Cross-origin requests (WHATWG Fetch, "CORS protocol"): which pages' scripts may use the API.

Knows headers only. Credentials are API keys that a script has to name itself, never cookies, so none are allowed along.
"""

import re
from collections.abc import Iterable, Sequence

Headers = list[tuple[bytes, bytes]]

_EXPOSED = (
    b"x-request-id, retry-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~, -]{0,2000}")
_MAX_AGE = b"600"  # seconds that a browser keeps the answer to a preflight


class Cors:
    """Of a server that allows `origins`, such as `https://example.com`; `*` stands for all."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.encode() for origin in origins)

    def headers(self, request: Iterable[tuple[bytes, bytes]]) -> Headers:
        """What an answer to a request with these headers carries."""
        if not self._origins:
            return []
        origin = _value(request, b"origin")
        if b"*" in self._origins:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        if origin not in self._origins:
            return [(b"vary", b"origin")]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    def preflight(self, method: str, request: Sequence[tuple[bytes, bytes]]) -> Headers | None:
        """Besides `headers`, what the answer to a preflight carries; None where it is none, or not from an allowed origin."""
        origin = _value(request, b"origin")
        if method != "OPTIONS" or not _value(request, b"access-control-request-method") or not origin:
            return None
        if not self._origins & {b"*", origin}:
            return None
        wanted = _value(request, b"access-control-request-headers")
        return [
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", wanted if _HEADER_NAMES.fullmatch(wanted) else b""),
            (b"access-control-max-age", _MAX_AGE),
        ]


def _value(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> bytes:
    return next((value for name, value in headers if name == wanted), b"")
