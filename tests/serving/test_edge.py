"""The edge's deadlines, on a clock that jumps, with an application and a server that are functions."""

import hashlib
import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from dashinfer.config import ServerConfig
from dashinfer.serving.auth import KeyRing
from dashinfer.serving.context import client
from dashinfer.serving.edge import KEEP_ALIVE, SCOPE_KEY, WRITE_PATIENCE, Edge, Receive, Scope, Send
from dashinfer.serving.service import Service

COMMENT = b": keep-alive\n\n"

Record = list[tuple[float, bytes]]
Server = Callable[[bytes], Awaitable[None]]


async def at_once(body: bytes) -> None:
    """A client that reads everything."""


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    return autojump_clock


async def serve(body: Callable[[Send], Awaitable[None]], *, write: Server = at_once, keep_alive: bytes = COMMENT) -> Record:
    """Run one request whose answer `body` sends: what the server was given, with the seconds since the request began."""
    record: Record = []
    writing = False
    began = trio.current_time()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        scope[SCOPE_KEY].keep_alive = keep_alive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await body(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict) -> None:
        nonlocal writing
        assert not writing, "one message at a time"
        if message.get("body"):
            record.append((trio.current_time() - began, message["body"]))
            writing = True
            await write(message["body"])
            writing = False

    edge = Edge(app, Service(ServerConfig(model="demo"), version="0"), KeyRing((), open_paths=()))
    await edge({"type": "http", "method": "GET", "path": "/", "headers": []}, receive, send)
    return record


def piece(body: bytes) -> dict:
    return {"type": "http.response.body", "body": body, "more_body": True}


@pytest.mark.parametrize("keep_alive", [COMMENT, b""])
async def test_a_silence_is_broken(clock: trio.testing.MockClock, keep_alive: bytes) -> None:
    async def body(send: Send) -> None:
        await trio.sleep(10)
        await send(piece(b"one"))
        await trio.sleep(2 * KEEP_ALIVE + 1)
        await send(piece(b"two"))
        await trio.sleep(KEEP_ALIVE - 1)

    record = await serve(body, keep_alive=keep_alive)

    comments = [(10 + KEEP_ALIVE, COMMENT), (10 + 2 * KEEP_ALIVE, COMMENT)] if keep_alive else []
    assert record == [(10, b"one"), *comments, (11 + 2 * KEEP_ALIVE, b"two")]


async def test_a_slow_write_is_no_silence(clock: trio.testing.MockClock) -> None:
    async def write(body: bytes) -> None:
        await trio.sleep(WRITE_PATIENCE - 1 if body == b"one" else 0)

    async def body(send: Send) -> None:
        await send(piece(b"one"))
        await trio.sleep(KEEP_ALIVE + 1)

    record = await serve(body, write=write)

    assert record == [(0, b"one"), (WRITE_PATIENCE - 1 + KEEP_ALIVE, COMMENT)]


async def test_an_answer_waits_for_the_sign_of_life_before_it(clock: trio.testing.MockClock) -> None:
    async def write(body: bytes) -> None:
        await trio.sleep(5)

    async def body(send: Send) -> None:
        await trio.sleep(KEEP_ALIVE + 1)
        await send(piece(b"one"))

    record = await serve(body, write=write)

    assert record == [(KEEP_ALIVE, COMMENT), (KEEP_ALIVE + 5, b"one")]


@pytest.mark.parametrize("stuck", [b"one", COMMENT])
async def test_a_write_that_waits_too_long_ends_the_request(
    clock: trio.testing.MockClock, stuck: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="dashinfer.access")

    async def write(body: bytes) -> None:
        if body == stuck:
            await trio.sleep_forever()

    async def body(send: Send) -> None:
        for _ in range(3):
            await trio.sleep(1)
            await send(piece(b"zero"))
        await trio.sleep(KEEP_ALIVE + 1 if stuck == COMMENT else 4)
        await send(piece(b"one"))

    began = trio.current_time()
    record = await serve(body, write=write)

    when, last = record[-1]
    assert last == stuck
    assert trio.current_time() - began == when + WRITE_PATIENCE
    assert "the client stopped reading" in caplog.text
    assert "cut short" in caplog.text


@pytest.mark.parametrize(
    ("keys", "peer", "expected"),
    [
        ((), ("192.0.2.7", 1234), "192.0.2.7"),
        ((), None, None),
        (("key",), ("192.0.2.7", 1234), hashlib.sha256(b"key").digest()),
    ],
)
async def test_who_takes_turns_is_a_key_or_where_none_is_needed_an_address(keys, peer, expected) -> None:
    clients: list = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        clients.append(client.get())

    async def nothing(*message: object) -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    edge = Edge(app, Service(ServerConfig(model="demo"), version="0"), KeyRing(keys, open_paths=()))
    headers = [(b"authorization", b"Bearer key")]
    await edge({"type": "http", "method": "GET", "path": "/", "headers": headers, "client": peer}, nothing, nothing)

    assert clients == [expected]
