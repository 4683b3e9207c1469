"""Exchanges: responses noted in any pieces, and real connections that end in every way."""

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import h11
import pytest
import trio

from dashinfer.bench.client import ask
from dashinfer.bench.exchange import Recorder, Response, exchange
from dashinfer.bench.target import Target

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(content: str, end: bytes = b"\n\n") -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": content}}]}).encode() + end


STREAM = HEAD + b"".join(map(chunk, (event("a"), b": keep-alive\n\n", event("b") + event("c0"), b"data: [DONE]\n\n"))) + END
BODY = event("a") + b": keep-alive\n\n" + event("b") + event("c0") + b"data: [DONE]\n\n"


class Counting(h11.Connection):
    """Counts what it is given to parse."""

    fed = 0

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        self.fed += 1
        super().receive_data(data)


def sent() -> Counting:
    connection = Counting(h11.CLIENT)
    connection.send(h11.Request(method="POST", target="/", headers=[("Host", "h"), ("Connection", "close")]))
    connection.send(h11.EndOfMessage())
    return connection


def record(*reads: bytes) -> tuple[int, Response]:
    """At which read, one a second, the response was over, counted from one (0: not at all), and the response."""
    recorder = Recorder(sent())
    over = next((number for number, data in enumerate(reads, 1) if recorder.add(number, data)), 0)
    return over, recorder.response()


@pytest.mark.parametrize("cut", range(1, len(STREAM)))
def test_a_stream_cut_in_two_anywhere_is_whole_and_over_at_its_last_byte(cut: int) -> None:
    over, response = record(STREAM[:cut], STREAM[cut:])

    assert over == 2
    assert (response.status, response.error, response.content) == (200, None, BODY)
    before = b"".join(data for now, data in response.body if now == 1)
    assert BODY.startswith(before)
    assert len(before) <= max(cut - len(HEAD), 0)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_a_stream_in_small_pieces_is_whole(size: int) -> None:
    reads = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]

    over, response = record(*reads)

    assert over == len(reads)
    assert (response.error, response.content) == (None, BODY)


def test_bytes_have_the_times_of_their_reads() -> None:
    _, response = record(HEAD, chunk(b"a"), chunk(b"b")[:4], chunk(b"b")[4:] + chunk(b"c") + chunk(b"d"), chunk(b"e") + END)

    assert response.body == [(2, b"a"), (3, b"b"), (4, b"c"), (4, b"d"), (5, b"e")]


def test_nothing_is_parsed_between_the_head_and_the_end() -> None:
    connection = sent()
    recorder = Recorder(connection)
    reads = [HEAD[:20], HEAD[20:], *[chunk(event("a", b"\r\n\r\n"))] * 50, END]

    over = [recorder.add(now, data) for now, data in enumerate(reads)]

    assert over == [False] * 52 + [True]
    assert connection.fed == 2
    assert len(recorder.response().body) == 50


@pytest.mark.parametrize(
    ("reads", "over", "content"),
    [
        ((b"HTTP/1.1 200 OK\r\n\r\nab", b"cd", b""), 3, b"abcd"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab", b"cd"), 2, b"abcd"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",), 1, b""),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", HEAD, END), 3, b""),
        ((HEAD + chunk(b"a") + b"0\r\nx: y\r\n\r\n", b""), 1, b"a"),
        ((HEAD, chunk(b"a") + b"0\r\nx: y\r\n\r\n", b""), 3, b"a"),
    ],
)
def test_every_framing_has_its_end(reads: tuple[bytes, ...], over: int, content: bytes) -> None:
    ended, response = record(*reads)

    assert (ended, response.status, response.error, response.content) == (over, 200, None, content)


@pytest.mark.parametrize(
    ("reads", "status", "error"),
    [
        ((b"",), None, "closed the connection without an answer"),
        ((b"HTTP/1.1 200", b""), None, "closed the connection without an answer"),
        ((b"hello\r\n\r\n",), None, "RemoteProtocolError"),
        ((HEAD, chunk(b"ab"), b""), 200, "peer closed connection"),
        ((HEAD, chunk(b"ab"), b"zz\r\n", b""), 200, "RemoteProtocolError"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n", b"ab", b""), 200, "peer closed connection"),
    ],
)
def test_a_response_that_is_torn_or_malformed_says_so(reads: tuple[bytes, ...], status: int | None, error: str) -> None:
    over, response = record(*reads)

    assert over == len(reads)
    assert response.status == status
    assert error in (response.error or "")
    assert response.content == (b"ab" if status else b"")


Answer = Callable[[trio.SocketStream], Awaitable[None]]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Target]:
    """A server of real connections: reads one request each, then `answer` does what it likes."""

    async def handle(stream: trio.SocketStream) -> None:
        data = b""
        while b'"messages"' not in data:
            data += await stream.receive_some()
        await answer(stream)

    async with trio.open_nursery() as nursery:
        listener = (await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1")))[0]
        yield Target(label="real", url=f"http://127.0.0.1:{listener.socket.getsockname()[1]}/v1", model="m")
        nursery.cancel_scope.cancel()


async def stream_and_stay(stream: trio.SocketStream) -> None:
    await stream.send_all(HEAD)
    for data in (event("a"), event("b"), b"data: [DONE]\n\n"):
        await trio.sleep(0.02)
        await stream.send_all(chunk(data))
    await stream.send_all(END)
    await trio.sleep_forever()


async def refuse(stream: trio.SocketStream) -> None:
    await stream.send_all(b"HTTP/1.1 503 Busy\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"queue ") + chunk(b"full") + END)


async def leave(stream: trio.SocketStream) -> None:
    await stream.send_all(HEAD + chunk(event("a")))


async def reset(stream: trio.SocketStream) -> None:
    await leave(stream)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # closing sends RST


async def stay_silent(stream: trio.SocketStream) -> None:
    await leave(stream)
    await trio.sleep_forever()


async def test_an_answer_over_a_real_connection_ends_though_the_server_keeps_it_open() -> None:
    with trio.fail_after(10):
        async with serving(stream_and_stay) as target:
            sample = await ask(target, "hello", 2, {}, 60)

    assert (sample.error, sample.text, sample.output_tokens) == (None, "ab", 2)
    assert sample.ttft is not None and sample.ttft >= 0.02
    assert sample.tpot is not None and sample.tpot > 0.01
    assert sample.last is not None and sample.last < sample.finished


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refuse, "HTTP 503: queue full"),
        (leave, "RemoteProtocolError: peer closed connection"),
        (reset, "ReadError: "),
        (stay_silent, "no complete answer within 0.2 s"),
    ],
)
async def test_real_connections_that_fail(answer: Answer, error: str) -> None:
    with trio.fail_after(10):
        async with serving(answer) as target:
            sample = await ask(target, "hello", 2, {}, 0.2 if answer is stay_silent else 60)

    assert error in (sample.error or "")
    assert sample.finished > sample.started
    if answer in (leave, stay_silent):  # what came before the failure is kept
        assert sample.text == "a"


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}/v1", "https://127.0.0.1:{port}/v1", "http://h:99999", "http://"])
async def test_no_connection_is_a_failure_not_an_exception(url: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    recording = await exchange("GET", url.format(port=port), {}, b"", 10)

    assert (recording.response().error or "").startswith("ConnectError: ")


async def test_connecting_is_under_the_limit_and_failing_takes_its_time(autojump_clock: trio.testing.MockClock) -> None:
    async def connect(url: str, seconds: float) -> trio.abc.Stream:
        await trio.sleep(seconds)
        raise OSError("unreachable")

    failed = await exchange("GET", "http://h/", {}, b"", 10, partial(connect, seconds=4))
    late = await exchange("GET", "http://h/", {}, b"", 10, partial(connect, seconds=40))

    assert (failed.finished - failed.started, failed.response().error) == (4, "ConnectError: unreachable")
    assert (late.finished - late.started, late.response().error) == (10, "no complete answer within 10 s")


async def test_a_header_that_cannot_be_sent_is_a_failure() -> None:
    recording = await exchange("GET", "http://127.0.0.1:9/", {"Authorization": "Bearer a\nb"}, b"", 10)

    assert (recording.response().error or "").startswith("LocalProtocolError: ")
