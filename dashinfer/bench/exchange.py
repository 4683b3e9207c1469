"""One HTTP/1.1 exchange on a connection of its own: noted read by read while it lasts, parsed once it is over.

The load generator shares its cores with the server under test, so nothing is parsed while an answer streams. Knows nothing of
chat, of events or of JSON.
"""

import contextlib
import functools
import os
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

import h11
import trio

Connect = Callable[[str], Awaitable[trio.abc.Stream]]  # from a URL

READ_BYTES = 16 * 1024
_LAST_CHUNK = b"\r\n0\r\n\r\n"  # the end of an answer in chunks, without trailers: those who send trailers close


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


async def open_stream(url: str) -> trio.abc.Stream:
    """A connection to the server of an `http` or `https` URL, TLS handshake done.

    Raises:
        OSError: nobody answers there.
        ValueError: the URL's host or port cannot be.
        trio.BrokenResourceError: the TLS handshake failed.
    """
    parts = urlsplit(url)
    if not parts.hostname:
        raise ValueError(f"{url!r} has no host")
    if parts.scheme != "https":
        return await trio.open_tcp_stream(parts.hostname, parts.port or 80)
    stream = await trio.open_ssl_over_tcp_stream(parts.hostname, parts.port or 443, https_compatible=True, ssl_context=_tls())
    try:
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer, or what came of it.

    Attributes:
        status: HTTP status; None if none arrived.
        body: (seconds, bytes) in order: when each piece was read, chunked framing taken off.
        error: one line; None if the answer is complete.
    """

    status: int | None = None
    body: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    @property
    def content(self) -> bytes:
        return b"".join(data for _, data in self.body)


class Recorder:
    """Notes the reads of one response, and finds its end without parsing it. Pure.

    An answer in chunks is over when a read completes its last chunk, and one without a length when the connection ends; answers
    with a length are parsed as they arrive.

    Args:
        connection: has sent the request.
    """

    def __init__(self, connection: h11.Connection) -> None:
        self._connection = connection
        self._reads: list[tuple[float, bytes]] = []  # not parsed yet
        self._tail = b""
        self._deferred = False  # the head is known, and parsing can wait for the end
        self._chunked = False
        self._complete = False
        self._status: int | None = None
        self._body: list[tuple[float, bytes]] = []
        self._error: str | None = None

    def add(self, now: float, data: bytes) -> bool:
        """Notes a read; no bytes are the end of the connection. Returns whether the response is over."""
        self._reads.append((now, data))
        self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
        if not self._deferred:
            self._parse()
            return self._complete or self._error is not None or not data
        return not data or (self._chunked and self._tail == _LAST_CHUNK)

    def response(self, failure: str | None = None) -> Response:
        """The response so far, parsed. To be called once, after the last `add`.

        Args:
            failure: why it goes no further, where the reason is not in the bytes.
        """
        if self._error is None:
            self._parse()
        error = failure or self._error
        if error is None and not self._complete:
            error = "RemoteProtocolError: the answer is not complete"
        return Response(status=self._status, body=self._body, error=error)

    def _parse(self) -> None:
        try:
            for now, data in self._reads:
                if self._complete:
                    break
                if not data and self._status is None:
                    raise h11.RemoteProtocolError("the server closed the connection without an answer")
                self._connection.receive_data(data)
                self._take_events(now)
        except h11.RemoteProtocolError as error:
            self._error = f"RemoteProtocolError: {error}"
        self._reads.clear()

    def _take_events(self, now: float) -> None:
        while not self._complete:
            event = self._connection.next_event()
            if isinstance(event, h11.Response):
                self._status = event.status_code
                framing = dict(event.headers)
                self._chunked = b"transfer-encoding" in framing
                self._deferred = self._chunked or b"content-length" not in framing
            elif isinstance(event, h11.Data):
                self._body.append((now, bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                self._complete = True
            elif not isinstance(event, h11.InformationalResponse):
                break  # NEED_DATA


@dataclass(kw_only=True)
class Recording:
    """An exchange that is over. Times are `trio.current_time()`.

    Attributes:
        started: just before the request was sent, connected; or before connecting, where that failed.
        finished: when the answer's last byte was read, or the exchange failed.
        recorder: what was read.
        failure: why the exchange broke off; None where that is in the bytes.
    """

    started: float
    finished: float
    recorder: Recorder
    failure: str | None = None

    def response(self) -> Response:
        """Parses what was read. To be called once."""
        return self.recorder.response(self.failure)


async def exchange(
    method: str, url: str, headers: dict[str, str], body: bytes, limit: float, connect: Connect = open_stream
) -> Recording:
    """Sends one request and notes the answer's reads. Every failure is noted in the recording; nothing is raised.

    Args:
        headers: beyond `Host`, `Accept`, `Content-Length` and `Connection: close`.
        limit: seconds for everything, connecting included.
        connect: opens the connection, as `open_stream` does.
    """
    now = trio.current_time()
    connection = h11.Connection(h11.CLIENT)
    recording = Recording(started=now, finished=now, recorder=Recorder(connection))
    with trio.move_on_after(limit) as scope:
        try:
            request = _encode(connection, method, url, headers, body)
            stream = await connect(url)
        except h11.LocalProtocolError as error:
            recording.failure = f"LocalProtocolError: {error}"
        except (OSError, ValueError, trio.BrokenResourceError) as error:
            recording.failure = f"ConnectError: {error.__cause__ or error}"
            recording.finished = trio.current_time()
        else:
            try:
                await _converse(stream, request, recording)
            finally:
                await trio.aclose_forcefully(stream)
    if scope.cancelled_caught:
        recording.failure = f"no complete answer within {limit:g} s"
        recording.finished = trio.current_time()
    return recording


def _encode(connection: h11.Connection, method: str, url: str, headers: dict[str, str], body: bytes) -> bytes:
    parts = urlsplit(url)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (f"?{parts.query}" if parts.query else "")
    fields = {"Host": parts.netloc.rpartition("@")[2], "Accept": "*/*", "Connection": "close", **headers}
    if body:
        fields["Content-Length"] = str(len(body))
    head = h11.Request(method=method, target=target, headers=[(name, value.encode()) for name, value in fields.items()])
    pieces = (connection.send(event) for event in (head, h11.Data(data=body), h11.EndOfMessage()))
    return b"".join(piece or b"" for piece in pieces)


async def _read(stream: trio.abc.Stream) -> bytes:
    """The next bytes, b"" at the end. Raises OSError or trio.BrokenResourceError.

    Of a plain socket, one system call after it has become readable; trio's own `receive_some` tries before it waits.
    """
    if not isinstance(stream, trio.SocketStream):
        return await stream.receive_some(READ_BYTES)
    while True:
        await trio.lowlevel.wait_readable(stream.socket)
        with contextlib.suppress(BlockingIOError):
            return os.read(stream.socket.fileno(), READ_BYTES)


async def _converse(stream: trio.abc.Stream, request: bytes, recording: Recording) -> None:
    add, clock = recording.recorder.add, trio.current_time
    recording.started = clock()
    with contextlib.suppress(trio.BrokenResourceError):  # refused before it was read: the answer is there to be read
        await stream.send_all(request)
    try:
        over = False
        while not over:
            data = await _read(stream)
            over = add(clock(), data)
    except (OSError, trio.BrokenResourceError) as error:
        recording.failure = f"ReadError: {error.__cause__ or error}"
    recording.finished = clock()
