"""A hub and agents in one process, over loopback, with fake ranks; and a wire between them that can be cut."""

import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from dashinfer.cluster import network
from dashinfer.cluster.agent import Agent
from dashinfer.cluster.hub import Hub
from dashinfer.cluster.link import make_key
from dashinfer.cluster.messages import fingerprint
from dashinfer.types import ModelFiles, WorkerConfig
from dashinfer.worker.supervisor import Rank, one_error

FAKE_WORKER = Path(__file__).parents[1] / "worker" / "fake_worker.py"
FILES = ModelFiles("fake", "safetensors", (), {"layers": 2})
KEY = make_key("a secret")


def make_rank(mode: str):
    return partial(Rank, command=[sys.executable, str(FAKE_WORKER), mode])


def configs(world_size: int, local_size: int = 1) -> list[WorkerConfig]:
    return [
        WorkerConfig(
            rank=rank,
            world_size=world_size,
            files=FILES,
            device="cpu",
            data_type="float32",
            load_format="dummy",
            max_batch=2,
            max_length=None,
            max_step_tokens=None,
            block_size=None,
            kv_cache_memory=None,
            local_rank=rank % local_size,
            local_size=local_size,
        )
        for rank in range(world_size)
    ]


@contextmanager
def make_hub(*, port: int = 0, **changes: Any) -> Iterator[tuple[Hub, int]]:
    """A hub and its port."""
    with network.bind("127.0.0.1", port, None) as listener:
        defaults = {
            "key": KEY,
            "master_addr": "127.0.0.1",
            "nnodes": 2,
            "ranks": 1,
            "model": "fake",
            "fingerprint": fingerprint(FILES),
            "heartbeat_timeout": 3.0,
            "make_rank": make_rank("good"),
        }
        yield Hub(listener, **(defaults | changes)), listener.getsockname()[1]


def make_agent(port: int, **changes: Any) -> Agent:
    defaults = {
        "master_addr": "127.0.0.1",
        "master_port": port,
        "key": KEY,
        "node_rank": 1,
        "nnodes": 2,
        "ranks": 1,
        "model": "fake",
        "files": FILES,
        "heartbeat_timeout": 3.0,
        "make_rank": make_rank("good"),
    }
    return Agent(**(defaults | changes))


class Wire:
    """A TCP proxy: `cut` stops it from forwarding anything, and closes nothing; `mend` lets what comes pass again."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._whole = trio.Event()
        self._whole.set()
        self.port = 0
        self.forwarded = bytearray()  # from the agents

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        await trio.serve_listeners(self._serve, [listener], task_status=task_status)

    def cut(self) -> None:
        self._whole = trio.Event()

    def mend(self) -> None:
        self._whole.set()

    async def _serve(self, agent: trio.SocketStream) -> None:
        async with agent:
            await self._whole.wait()
            try:
                async with await trio.open_tcp_stream("127.0.0.1", self._target) as hub, trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, agent, hub, self.forwarded)
                    nursery.start_soon(self._pump, hub, agent, bytearray())
            except* (trio.BrokenResourceError, OSError):
                pass

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream, record: bytearray) -> None:
        async for data in source:
            await self._whole.wait()
            record += data
            await sink.send_all(data)
        await self._whole.wait()
        await sink.send_eof()


class Group:
    """A group that runs in the background, and what it said."""

    def __init__(self, hub: Hub, ranks: Sequence[WorkerConfig], *, replica: int = 0) -> None:
        self.workers = hub.workers(ranks, replica=replica)
        self.results: list = []

    async def run(self, *, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED) -> None:
        await self.workers.run(on_progress=lambda message: None, on_result=self.results.append, task_status=task_status)


@asynccontextmanager
async def background(*services: Any) -> AsyncIterator[trio.Nursery]:
    """Each is started, and all are cancelled at the end."""
    with one_error():
        async with trio.open_nursery() as nursery:
            for service in services:
                nursery.start_soon(service)
            yield nursery
            nursery.cancel_scope.cancel()
