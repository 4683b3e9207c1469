"""Connections to public hosts: a name is resolved once, all its addresses are checked, and one of those is connected to.

Knows nothing of HTTP. Proxies named in the environment are never used.
"""

import functools
import socket
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Protocol

import trio

from dashinfer.errors import MediaError
from dashinfer.vision.addresses import IPAddress, is_public
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.url import HttpUrl

MAX_ADDRESSES = 4  # of a name's addresses, so many are tried
ATTEMPT_DELAY = 0.25  # seconds until the next address is tried beside one that does not answer (RFC 8305)
_LOOKUPS = 32  # most names that are looked up at the same time

_lookup_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("media_lookup_limiter")


class Network(Protocol):
    """What of the outside a fetch needs."""

    async def resolve(self, host: str, port: int) -> Sequence[IPAddress]:
        """All addresses of a host, best first. Raises OSError."""
        ...

    async def connect(self, address: IPAddress, port: int) -> trio.abc.Stream:
        """A TCP connection to exactly this address. Raises OSError."""
        ...

    async def tls_context(self) -> ssl.SSLContext:
        """A client's context that verifies certificates and names."""
        ...


class Internet:
    """The system's resolver, TCP, and the system's certificates (or those that `SSL_CERT_FILE` names)."""

    async def resolve(self, host: str, port: int) -> list[IPAddress]:
        try:
            return [ip_address(host)]
        except ValueError:
            pass
        # Lookups have threads of their own: a name whose server never answers holds one for many seconds, and trio's common
        # ones are needed for other work.
        try:
            limiter = _lookup_limiter.get()
        except LookupError:
            limiter = trio.CapacityLimiter(_LOOKUPS)
            _lookup_limiter.set(limiter)
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        answers = await trio.to_thread.run_sync(look_up, limiter=limiter, abandon_on_cancel=True)
        return [ip_address(str(place[0])) for *_, place in answers]

    async def connect(self, address: IPAddress, port: int) -> trio.SocketStream:
        connection = trio.socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
        try:
            await connection.connect((str(address), port))
            return trio.SocketStream(connection)
        except BaseException:
            connection.close()
            raise

    async def tls_context(self) -> ssl.SSLContext:
        return await trio.to_thread.run_sync(_system_context)


@functools.cache
def _system_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


async def open_connection(url: HttpUrl, policy: MediaPolicy, network: Network) -> trio.abc.Stream:
    """A connection to the URL's host, encrypted and with the host's certificate verified if the scheme is https.

    Raises:
        MediaError: the policy forbids the host or one of its addresses, or no connection comes about.
    """
    host = url.host
    if policy.allowed_domains and not any(host == name or host.endswith("." + name) for name in policy.allowed_domains):
        raise MediaError("its host is not among those that this server allows")
    stream = await _connect_to_first(await _checked_addresses(url, policy, network), url.port, network)
    if url.scheme == "http":
        return stream
    try:
        context = await network.tls_context()
        encrypted = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
        await encrypted.do_handshake()
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error.__cause__, ssl.SSLCertVerificationError):
            raise MediaError("its host's certificate is not valid") from error
        raise MediaError("no secure connection to its host comes about") from error
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return encrypted


async def _checked_addresses(url: HttpUrl, policy: MediaPolicy, network: Network) -> list[IPAddress]:
    """The host's addresses; one that is not public refuses all. An absent and an internal name get the same error."""
    try:
        addresses = list(dict.fromkeys(await network.resolve(url.host, url.port)))
    except (OSError, UnicodeError):  # UnicodeError: a label that the resolver cannot encode
        addresses = []
    if policy.allow_private:
        if not addresses:
            raise MediaError("its host has no address")
    elif not addresses or not all(is_public(address) for address in addresses):
        raise MediaError("its host has no address, or one that is not public")
    return addresses[:MAX_ADDRESSES]


async def _connect_to_first(addresses: Sequence[IPAddress], port: int, network: Network) -> trio.abc.Stream:
    """The first connection that comes about; attempts begin one after the other, `ATTEMPT_DELAY` apart or when one fails."""
    winner: trio.abc.Stream | None = None

    async def attempt(place: int) -> None:
        nonlocal winner
        failed = trio.Event()
        if place + 1 < len(addresses):
            nursery.start_soon(attempt_later, place + 1, failed)
        try:
            stream = await network.connect(addresses[place], port)
        except OSError:
            failed.set()
            return
        if winner is None:
            winner = stream
            nursery.cancel_scope.cancel()
        else:
            await trio.aclose_forcefully(stream)

    async def attempt_later(place: int, failed: trio.Event) -> None:
        with trio.move_on_after(ATTEMPT_DELAY):
            await failed.wait()
        await attempt(place)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, 0)
    if winner is None:
        raise MediaError("its host cannot be reached")
    return winner
