"""Signals at moments that nobody can time: before there is something to end, and after it has ended."""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from dashinfer.config import ServerConfig
from dashinfer.serving.run import Server
from dashinfer.serving.service import Service

from .fake_engine import FakeBackend


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that are there as soon as somebody takes signals."""
    waiting: list[int] = []

    async def taken() -> AsyncIterator[int]:
        while waiting:
            yield waiting.pop(0)
        await trio.sleep_forever()

    @contextmanager
    def receiver(*numbers: int) -> Iterator[AsyncIterator[int]]:
        yield taken()

    monkeypatch.setattr(trio, "open_signal_receiver", receiver)
    return waiting


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(ServerConfig(model="fake", host="127.0.0.1", port=0), FakeBackend(tmp_path))


async def test_before_anything_runs(server: Server, signals: list[int]) -> None:
    signals += [signal.SIGTERM, signal.SIGINT]
    with trio.fail_after(10):
        await server.serve()

    assert server.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize("count", [1, 2])
async def test_after_everything_has_ended(server: Server, signals: list[int], count: int) -> None:
    """The engine has failed, and the last part of the server has just ended."""
    server._service = Service(server._config, version="0")
    server._service.fail("a test")
    async with trio.open_nursery() as server._root:
        pass
    signals += [signal.SIGTERM] * count
    async with trio.open_nursery() as outside:
        await outside.start(server._watch_signals)
        await trio.testing.wait_all_tasks_blocked()
        outside.cancel_scope.cancel()

    assert server.exit_code == (None if count == 1 else 0)
