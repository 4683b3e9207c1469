"""An internet in memory: names with the addresses that they resolve to, and servers at addresses, as hostile as can be."""

import contextlib
import ssl
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

import trio
import trio.testing

from dashinfer.vision.addresses import IPAddress

Server = Callable[[trio.abc.Stream], Awaitable[Any]]

SERVER_ADDRESS = "93.184.216.34"


class Line(trio.abc.Stream):
    """A client's end that its internet knows to be open or closed."""

    def __init__(self, stream: trio.abc.Stream, internet: "FakeInternet") -> None:
        self.stream = stream
        self.internet = internet
        internet.open_lines.add(self)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        self.internet.open_lines.discard(self)
        await trio.aclose_forcefully(self.stream)


class FakeInternet:
    """Implements `dashinfer.vision.network.Network`.

    Attributes:
        names: the answers of each name in the order of lookups; the last one goes on to hold. Unknown names do not exist.
        servers: what listens, by (address, port); at other addresses connections are refused. None never answers.
        record: lookups as `host`, connections as `address:port`, in their order.
        open_lines: connections that the client has not closed.
    """

    def __init__(self, nursery: trio.Nursery, authority: ssl.SSLContext | None = None) -> None:
        self.nursery = nursery
        self.authority = authority
        self.names: dict[str, list[list[str]]] = {}
        self.servers: dict[tuple[str, int], Server | None] = {}
        self.record: list[str] = []
        self.open_lines: set[Line] = set()

    def add(self, name: str, server: Server | None, *, address: str = SERVER_ADDRESS, port: int = 80) -> None:
        self.names[name] = [[address]]
        self.servers[address, port] = server

    async def resolve(self, host: str, port: int) -> list[IPAddress]:
        await trio.lowlevel.checkpoint()
        try:
            return [ip_address(host)]
        except ValueError:
            self.record.append(host)
        if host not in self.names:
            raise OSError("no such name")
        answers = self.names[host]
        return [ip_address(text) for text in (answers.pop(0) if len(answers) > 1 else answers[0])]

    async def connect(self, address: IPAddress, port: int) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.record.append(f"{address}:{port}")
        if (str(address), port) not in self.servers:
            raise ConnectionRefusedError
        server = self.servers[str(address), port]
        if server is None:
            await trio.sleep_forever()
        near, far = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self._serve, server, far)
        return Line(near, self)

    async def _serve(self, server: Server, stream: trio.abc.Stream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError):
                await server(stream)

    async def tls_context(self) -> ssl.SSLContext:
        assert self.authority is not None
        return self.authority


async def read_head(stream: trio.abc.Stream) -> bytes:
    """A request up to its empty line."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some()
        if not data:
            raise trio.BrokenResourceError("the client left before its request was whole")
        head += data
    return head


def says(*parts: bytes) -> Server:
    """A server that reads a request, sends the parts and closes."""

    async def serve(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        for part in parts:
            await stream.send_all(part)

    return serve


def says_forever(head: bytes, part: bytes, *, pause: float = 0) -> Server:
    """A server that reads a request, sends the head and then the part again and again, `pause` seconds apart."""

    async def serve(stream: trio.abc.Stream) -> None:
        await read_head(stream)
        await stream.send_all(head)
        while True:
            await trio.sleep(pause)
            await stream.send_all(part)

    return serve


def redirection(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def redirects_to(location: str) -> Server:
    return says(redirection(location))


def encrypted(server: Server, context: ssl.SSLContext) -> Server:
    """The server behind TLS."""

    async def serve(stream: trio.abc.Stream) -> None:
        await server(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    return serve
