"""What a client can do to a connection ends that connection or request, and nothing else."""

import json
from collections.abc import Sequence

import pytest
import trio
import trio.testing
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, Event, ResponseReceived, StreamEnded, StreamReset

from dashinfer.serving import edge

from .conftest import Running, RunServer

UPGRADE = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n"
H2C = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"


class Client:
    """HTTP/2 with prior knowledge, which says what it is told to."""

    def __init__(self, stream: trio.SocketStream) -> None:
        config = H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding="utf-8")
        self.connection = H2Connection(config)
        self.connection.initiate_connection()
        self._stream = stream

    @staticmethod
    def headers(method: str | bytes = "GET", path: str | bytes = "/health") -> list[tuple[str, str | bytes]]:
        return [(":method", method), (":path", path), (":scheme", "http"), (":authority", "x")]

    async def send(self) -> None:
        await self._stream.send_all(self.connection.data_to_send())

    async def until(self, kind: type[Event], stream_id: int) -> list[Event]:
        """What comes, up to an event of this kind of this request."""
        events: list[Event] = []
        while not any(isinstance(event, kind) and event.stream_id == stream_id for event in events):
            data = await self._stream.receive_some()
            assert data, "the connection has ended"
            events += self.connection.receive_data(data)
            await self.send()
        return events

    async def get(self, stream_id: int) -> str:
        """The status of a request for `/health`."""
        self.connection.send_headers(stream_id, self.headers(), end_stream=True)
        await self.send()
        events = await self.until(StreamEnded, stream_id)
        return next(dict(event.headers)[":status"] for event in events if isinstance(event, ResponseReceived))


async def connect(server: Running) -> trio.SocketStream:
    host, port = server.url.removeprefix("http://").split(":")
    return await trio.open_tcp_stream(host, int(port))


def priorities(*pairs: tuple[int, int]) -> bytes:
    """PRIORITY frames: stream and what it depends on."""
    return b"".join(
        (5).to_bytes(3, "big") + b"\x02\x00" + stream.to_bytes(4, "big") + parent.to_bytes(4, "big") + b"\x0f"
        for stream, parent in pairs
    )


def preface() -> bytes:
    connection = H2Connection()
    connection.initiate_connection()
    return connection.data_to_send()


@pytest.mark.parametrize(
    "sent",
    [
        UPGRADE + b"upgrade: websocket\r\nsec-websocket-protocol: \xff\r\n\r\n",
        UPGRADE + b"upgrade: websocket\r\nsec-websocket-extensions: \xff\r\n\r\n",
        H2C + b"http2-settings: a\r\n\r\n",
        preface() + priorities(*((1 + 2 * number, 0) for number in range(1100))),
        UPGRADE + b"upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\nx",
    ],
    ids=["protocol", "extensions", "settings", "priorities", "early"],
)
async def test_a_connection_fails_alone(run_server: RunServer, sent: bytes) -> None:
    async with run_server() as server:
        body = json.dumps(server.body("say a b c", stream=True)).encode()
        async with server.client.stream("POST", "/v1/chat/completions", content=body) as running:
            async with await connect(server) as stream:
                await stream.send_all(sent)
                with trio.move_on_after(0.5):
                    async for _ in stream:
                        pass
            text = "".join([part async for part in running.aiter_text()])
        after = await server.client.get("/health")

    assert text.endswith("data: [DONE]\n\n")
    assert after.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        Client.headers(path=b"/\xff"),
        Client.headers(method=b"\xff"),
        [(":method", "CONNECT"), (":authority", "x")],
        [(":method", "CONNECT"), *Client.headers()[1:], (":protocol", "websocket"), ("sec-websocket-protocol", b"\xff")],
    ],
    ids=["path", "method", "connect", "websocket"],
)
async def test_a_request_in_http2_fails_alone(run_server: RunServer, headers: Sequence[tuple[str, str | bytes]]) -> None:
    async with run_server() as server, await connect(server) as stream:
        client = Client(stream)
        with trio.fail_after(10):
            before = await client.get(1)
            client.connection.send_headers(3, headers, end_stream=True)
            await client.send()
            ended = await client.until(StreamReset, 3)
            after = await client.get(5)

    assert [event.stream_id for event in ended if isinstance(event, StreamReset)] == [3]
    assert (before, after) == ("200", "200")


async def test_a_body_that_comes_after_its_answer(run_server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of it than a window holds: the connection has room for others."""
    monkeypatch.setattr(edge, "UPLOAD_PATIENCE", 0.05)
    async with run_server(api_keys=("sk-1",)) as server, await connect(server) as stream:
        client = Client(stream)
        with trio.fail_after(10):
            client.connection.send_headers(1, client.headers("POST", "/v1/chat/completions"))
            await client.send()
            answer = await client.until(StreamEnded, 1)
            for _ in range(6):
                client.connection.send_data(1, bytes(10_000))
                await client.send()
            after = await client.get(3)

    assert b"no API key" in b"".join(event.data for event in answer if isinstance(event, DataReceived))
    assert after == "200"


async def test_lines_of_the_log_hold_no_control_characters(run_server: RunServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dashinfer.access")
    async with run_server() as server, await connect(server) as stream:
        client = Client(stream)
        with trio.fail_after(10):
            client.connection.send_headers(
                1, client.headers("G\x1b[2J" + "E" * 100, "/\x1b[2J 200 1 ms req-1"), end_stream=True
            )
            await client.send()
            await client.until(StreamEnded, 1)

    (line,) = [record.getMessage() for record in caplog.records if record.name == "dashinfer.access"]
    assert line.startswith("G%1B[2JEEEEEEEEEEEEE... /%1B[2J%20200%201%20ms%20req-1 4")


async def test_a_target_without_a_path(run_server: RunServer) -> None:
    async with run_server() as server, await connect(server) as stream:
        await stream.send_all(b"GET ?x=1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        with trio.fail_after(10):
            answer = b"".join([part async for part in stream])

    assert answer.split(b" ")[1] in (b"200", b"404")


@pytest.mark.parametrize(
    "head",
    [b"GET /health HTTP/1.1\r\nconnection: close\r\n", b"GET /health HTTP/1.0\r\n", b"POST /v1/chat/completions HTTP/1.0\r\n"],
)
async def test_a_connection_that_is_to_end_does(run_server: RunServer, head: bytes) -> None:
    """As nginx asks, which takes the end of the connection for that of a stream."""
    async with run_server() as server, await connect(server) as stream:
        body = json.dumps(server.body("say a b c", stream=True)).encode() if head.startswith(b"POST") else b""
        await stream.send_all(head + b"host: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        with trio.fail_after(10):
            answer = b"".join([part async for part in stream])

    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"[DONE]\n\n" if body else b"}")


async def test_a_connection_that_nobody_uses_any_more_ends(run_server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashinfer.serving.listen.KEEP_ALIVE", 0.2)
    async with run_server() as server, await connect(server) as stream:
        await stream.send_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        with trio.fail_after(10):
            answer = b"".join([part async for part in stream])

    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("during", [False, True])
async def test_a_connection_whose_client_has_left_ends_at_once(run_server: RunServer, during: bool) -> None:
    """After its answer, and while it is answered: nothing waits for the limit of its silence."""
    async with run_server() as server, await connect(server) as stream:
        body = json.dumps(server.body("say a b c")).encode()
        await stream.send_all(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        with trio.fail_after(10):
            if not during:
                assert (await stream.receive_some(65536)).startswith(b"HTTP/1.1 200")
                await trio.testing.wait_all_tasks_blocked(0.05)
            await stream.send_eof()
            async for _ in stream:
                pass
