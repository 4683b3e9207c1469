"""One GET over HTTP/1.1 with h11, on a connection of its own, within limits on every part of the answer.

Asks for no compression and takes none, keeps no cookies, and reads no body but the wanted one. Redirects are for the caller.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import h11
import trio

from dashinfer.errors import MediaError
from dashinfer.vision.network import Network, open_connection
from dashinfer.vision.policy import MediaPolicy
from dashinfer.vision.url import HttpUrl

MAX_HEAD = 32 * 1024  # bytes of a status line with headers, of a chunk's head, and of trailers
MAX_INTERIM = 8  # answers 1xx before the final one
_RECEIVE = 64 * 1024
_ROOM = 4 * 2**20  # bytes by which a body's room grows: a host that sends slowly takes little of it
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Redirect:
    """An answer that names another place."""

    location: str


async def get(
    url: HttpUrl, policy: MediaPolicy, network: Network, make_room: Callable[[int], Awaitable[None]]
) -> bytes | Redirect:
    """The body at the URL, or where to look for it. `make_room` is awaited whenever the body is about to be larger, with the
    bytes that it will be.

    Raises:
        MediaError: the host is refused or not reached, or its answer is not an unencoded body within `policy.max_bytes`.
    """
    async with await open_connection(url, policy, network) as stream:
        try:
            return await _exchange(stream, url, policy.max_bytes, make_room)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise MediaError("the connection to its host broke") from error
        except h11.RemoteProtocolError as error:
            raise MediaError("its host's answer is malformed or ended early") from error


async def _exchange(
    stream: trio.abc.Stream, url: HttpUrl, max_bytes: int, make_room: Callable[[int], Awaitable[None]]
) -> bytes | Redirect:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    received = 0

    async def next_event() -> h11.Event:
        nonlocal received
        while (event := connection.next_event()) is h11.NEED_DATA:
            data = await stream.receive_some(_RECEIVE)
            received += len(data)
            # The framing of chunks costs bytes too; more of it than content is no medium.
            if received > 2 * max_bytes + MAX_HEAD:
                raise _too_large(max_bytes)
            connection.receive_data(data)
        await trio.lowlevel.checkpoint()  # one receive may hold thousands of tiny events
        return event

    headers = [
        ("Host", url.authority),
        ("User-Agent", "dashinfer"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    request = connection.send(h11.Request(method="GET", target=url.target, headers=headers))
    await stream.send_all(request + connection.send(h11.EndOfMessage()))

    for _ in range(MAX_INTERIM + 1):
        response = await next_event()
        if not isinstance(response, h11.InformationalResponse):
            break
    if not isinstance(response, h11.Response):
        raise MediaError("its host's answer is malformed or ended early")
    if (location := _check_head(response, max_bytes)) is not None:
        return Redirect(location)

    body = bytearray()
    room = min(_ROOM, max_bytes)
    await make_room(room)
    while isinstance(event := await next_event(), h11.Data):
        if len(body) + len(event.data) > room:
            room = min(len(body) + _ROOM, max_bytes)
            await make_room(room)
        body += event.data
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _check_head(response: h11.Response, max_bytes: int) -> str | None:
    """Where a redirect leads; None if a body that can be taken follows."""
    headers = dict(response.headers)  # lower-case names; h11 has refused a repeated Content-Length
    if response.status_code in _REDIRECTS:
        if b"location" not in headers:
            raise MediaError("its host redirects it to nowhere")
        return headers[b"location"].decode("utf-8", "replace")
    if response.status_code != 200:
        raise MediaError(f"its host answered with status {response.status_code}")
    if any(name == b"content-encoding" and value.lower() not in (b"identity", b"") for name, value in response.headers):
        raise MediaError("its host sent it compressed, though asked not to")
    if int(headers.get(b"content-length", b"0")) > max_bytes:
        raise _too_large(max_bytes)
    return None


def _too_large(max_bytes: int) -> MediaError:
    return MediaError(f"it is larger than {max_bytes} bytes")
