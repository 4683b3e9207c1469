"""API keys: which paths are open without one, and whether a request carries one.

Everything is closed unless it is listed here, so a path spelled in a way nobody thought of is closed too. Looks at the decoded
path and the raw header bytes, never at anything rebuilt from them. Keeps digests of keys, never keys.
"""

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dashinfer.errors import AuthenticationFailed, ConfigurationError
from dashinfer.serving.limits import Limits

_MAX_DIGITS = 15  # of a limit
NOBODY = b""  # stands for who needs no key


def _digest(key: bytes) -> bytes:
    # Digests have one length, so comparing them says nothing about the length of a key either.
    return hashlib.sha256(key).digest()


class KeyRing:
    """The keys that open what is closed; without any, everything is open."""

    def __init__(
        self, keys: Iterable[str], *, open_paths: Iterable[str], file: Path | None = None, limits: Limits | None = None
    ) -> None:
        """Args: file: with more keys, see `read_keys`; limits: of a key that has none of its own, and of all who need none.

        Raises:
            ConfigurationError: the file cannot be used.
        """
        self.limits = limits or Limits()
        self._given = {_digest(key.encode()): self.limits for key in keys}
        self._file = file
        self._open_paths = frozenset(open_paths)
        self._keys: dict[bytes, Limits] = {}
        self.reload()

    def reload(self) -> int:
        """Read the file again, and return how many keys there are now. Raises ConfigurationError, and then changes nothing."""
        read = read_keys(self._file, self.limits) if self._file is not None else {}
        self._keys = self._given | read
        return len(self._keys)

    @property
    def names(self) -> set[bytes]:
        """What `check` may return."""
        return {NOBODY, *self._keys}

    def is_open(self, path: str) -> bool:
        """Whether a path wants no key and has no limits. `path`: as of `check`."""
        return path in self._open_paths

    def limits_of(self, name: bytes) -> Limits:
        """`name`: from `check`."""
        return self._keys.get(name, self.limits)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Let a request through or raise.

        Args:
            path: percent-decoded path, relative to where the application is mounted.
            headers: lower-case names and values as they came.

        Returns:
            What names its key; the same for all where none is needed.

        Raises:
            AuthenticationFailed: no key, more than one `Authorization` header, or a key that is not ours.
        """
        if not self._keys or self.is_open(path):
            return NOBODY
        headers = list(headers)
        values = [value for name, value in headers if name == b"authorization"]
        if not values and len(keys := [value for name, value in headers if name == b"x-api-key"]) == 1:
            values = [b"Bearer " + keys[0]]  # Anthropic's clients
        if not values:
            raise AuthenticationFailed("no API key: send it in the header `Authorization: Bearer <key>`, or `x-api-key: <key>`")
        scheme, _, key = values[0].strip().partition(b" ")
        if len(values) > 1 or scheme.lower() != b"bearer" or not key.strip():
            raise AuthenticationFailed("the Authorization header is not of the form `Bearer <key>`")
        given = _digest(key.strip())
        known = False
        for digest in self._keys:  # all of them, always: the time must not tell which one came close
            known |= hmac.compare_digest(digest, given)
        if not known:
            raise AuthenticationFailed("the API key is not valid")
        return given


def read_keys(file: Path, limits: Limits) -> dict[bytes, Limits]:
    """Digests of a file's keys with what each may use.

    A line has a key, and after it limits other than `limits`, such as `requests=60 tokens=100000 concurrent=4`; 0 is none.
    Empty lines and what follows a `#` at a word's begin are nothing.

    Raises:
        ConfigurationError: it cannot be read, has no key, or a line that is none. Nothing of a line is told but its number.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise ConfigurationError(f"--api-keys-file {file}: {reason}") from None
    found: dict[bytes, Limits] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
        if not (words := words[:comment]):
            continue
        own: dict[str, int | None] = {}
        for word in words[1:]:
            name, _, value = word.partition("=")
            if name not in ("requests", "tokens", "concurrent") or not value.isdigit() or len(value) > _MAX_DIGITS:
                raise ConfigurationError(
                    f"--api-keys-file {file}: line {number} has more than a key, and it is none of requests=N, tokens=N and "
                    "concurrent=N"
                )
            own[name] = int(value) or None
        found[_digest(words[0].encode())] = replace(limits, **own)
    if not found:
        raise ConfigurationError(f"--api-keys-file {file} has no key")
    return found
