"""API keys: which paths are open without one, and whether a request carries one.

Everything is closed unless it is listed here, so a path spelled in a way nobody thought of is closed too. Looks at the decoded
path and the raw header bytes, never at anything rebuilt from them.
"""

import hashlib
import hmac
from collections.abc import Iterable

from dashinfer.errors import AuthenticationFailed


class KeyRing:
    """The keys that open `/v1`; without any, everything is open."""

    def __init__(self, keys: Iterable[str], *, open_paths: Iterable[str]) -> None:
        # Digests have one length, so comparing them says nothing about the length of a key either.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._open_paths = frozenset(open_paths)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let a request through or raise.

        Args:
            path: percent-decoded path, relative to where the application is mounted.
            headers: lower-case names and values as they came.

        Raises:
            AuthenticationFailed: no key, more than one `Authorization` header, or a key that is not ours.
        """
        if not self._digests or path in self._open_paths:
            return
        values = [value for name, value in headers if name == b"authorization"]
        if not values:
            raise AuthenticationFailed("no API key: send it in the header `Authorization: Bearer <key>`")
        scheme, _, key = values[0].strip().partition(b" ")
        if len(values) > 1 or scheme.lower() != b"bearer" or not key.strip():
            raise AuthenticationFailed("the Authorization header is not of the form `Bearer <key>`")
        given = hashlib.sha256(key.strip()).digest()
        known = False
        for digest in self._digests:  # all of them, always: the time must not tell which one came close
            known |= hmac.compare_digest(digest, given)
        if not known:
            raise AuthenticationFailed("the API key is not valid")
