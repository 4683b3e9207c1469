"""HTTP URLs, read strictly: one meaning or none, so that the host that is checked is the host that is asked.

Knows nothing of policies and of the network.
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Literal
from urllib.parse import quote, urljoin

import idna

from dashinfer.errors import MediaError

MAX_LENGTH = 8192  # characters of a URL
_URL = re.compile(r"(https?)://([^/?#]*)([^?#]*)(\?[^#]*)?(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]{0,5}))?")
_CONTROL_OR_BACKSLASH = re.compile(r"[\x00-\x1f\x7f\\]")
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # what old resolvers read as an IPv4 address, or as a part of one
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class HttpUrl:
    """A URL's parts in the form that goes over the wire, all ASCII.

    Attributes:
        host: a name in lower case (`xn--` where it is international) without a last dot, or an IP address without brackets.
        target: path and query, percent-encoded; begins with a slash.
    """

    scheme: Literal["http", "https"]
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The `Host` header's value."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def parse_url(text: str) -> HttpUrl:
    """The URL's parts. A fragment is dropped.

    Raises:
        MediaError: not an HTTP URL, or one with credentials, a bad host or a bad port.
    """
    if len(text) > MAX_LENGTH:
        raise MediaError(f"its URL is longer than {MAX_LENGTH} characters")
    match = _URL.fullmatch(text)
    if match is None or _CONTROL_OR_BACKSLASH.search(text):
        raise MediaError("its URL is malformed")
    scheme, authority, path, query = match[1].lower(), match[2], match[3] or "/", match[4] or ""
    if "@" in authority:
        raise MediaError("its URL holds credentials; give one without")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise MediaError("its URL is malformed")
    port = int(parts[2]) if parts[2] else _PORTS[scheme]
    if not 1 <= port <= 65535:
        raise MediaError("its URL has a port that is not between 1 and 65535")
    try:
        target = quote(path + query, safe="!\"#$%&'()*+,/:;<=>?@[]^`{|}~")
    except UnicodeEncodeError:
        raise MediaError("its URL is malformed") from None
    return HttpUrl(scheme, _parse_host(parts[1]), port, target)


def resolve_location(base: HttpUrl, location: str) -> HttpUrl:
    """Where a redirect of `base` leads; `location` may be relative.

    Raises:
        MediaError: not an HTTP URL, and whatever else `parse_url` refuses.
    """
    if _CONTROL_OR_BACKSLASH.search(location):
        raise MediaError("it is redirected to a malformed URL")
    try:
        joined = urljoin(str(base), location.strip(" "))
    except ValueError:
        raise MediaError("it is redirected to a malformed URL") from None
    if not joined.lower().startswith(("http://", "https://")):
        raise MediaError("it is redirected to something that is not an HTTP URL")
    return parse_url(joined)


def _parse_host(text: str) -> str:
    if text.startswith("["):
        try:
            if "%" in text:  # a zone: addresses that have one are not public, and zones differ between machines
                raise AddressValueError
            return IPv6Address(text[1:-1]).compressed
        except AddressValueError:
            raise MediaError("its URL has a malformed IPv6 address as host") from None
    try:
        name = text.lower() if text.isascii() else idna.encode(text[:254], uts46=True).decode("ascii").lower()
    except idna.IDNAError:
        raise MediaError("its URL has a host that is not a name") from None
    name = name.removesuffix(".")
    if len(name) > 253 or not _NAME.fullmatch(name):
        raise MediaError("its URL has a host that is not a name")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            return str(IPv4Address(name))
        except AddressValueError:
            raise MediaError("its URL has a number as host; write an IPv4 address as four decimal numbers") from None
    return name
