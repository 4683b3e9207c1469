"""Clients that leave at random moments leave nothing behind: the real engine behind real HTTP, looked at from inside."""

import os
import random
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine
from dashinfer.serving import listen
from dashinfer.serving.app import create_app
from dashinfer.serving.connections import serve
from dashinfer.serving.service import Service, TextModel
from dashinfer.worker.supervisor import one_error
from tests.process_tree import children_of

REQUESTS = 300
AT_ONCE = 16
SETTLE = 5.0  # seconds; a step takes far less


def resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@asynccontextmanager
async def http_server(demo, text, config: ServerConfig):
    """An engine on the demo model and its address."""
    with listen.bind("127.0.0.1", 0) as sockets, one_error():
        async with trio.open_nursery() as nursery:
            engine = Engine(config, demo.files)
            await nursery.start(engine.run)
            service = Service(config, version="test")
            service.ready(engine, TextModel(text.tokenizer, text.template, demo.generation_config))
            url = listen.url(sockets)
            settings = listen.hypercorn_config(sockets, graceful_timeout=1)
            await nursery.start(service.background.run)
            await nursery.start(partial(serve, create_app(service), settings, mode="asgi"))
            yield engine, url
            nursery.cancel_scope.cancel()


async def leave_early(client: httpx.AsyncClient, number: int, patience: float) -> bool:
    """Ask for more than there is time for. True if the answer came all the same."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": f"{number % 20}: tell me a story about a sailor and the sea."}],
        "max_tokens": 400,
        "ignore_eos": True,
        "n": 1 + number % 3,
        "stream": number % 2 == 0,
    }
    with trio.move_on_after(patience) as scope:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            async for _ in response.aiter_bytes():
                pass
    return not scope.cancelled_caught


# The client's own: httpx leaves the generator of a request's body to the garbage collector when it is cancelled.
@pytest.mark.filterwarnings("ignore:Async generator 'httpx:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
async def test_clients_that_leave_at_random_moments(demo, text):
    # A pool that the first requests fill, so that memory has no reason to grow after them.
    config = ServerConfig(model="demo", max_batch=AT_ONCE, max_length=512, kv_cache_memory=24 * 2**20, max_queue=1000)
    moments = random.Random(7)
    resident: list[float] = []
    others = {*children_of("self")}  # such as the server of other tests
    async with http_server(demo, text, config) as (engine, url):
        (worker,) = {*children_of("self")} - others
        limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            for first in range(0, REQUESTS, 50):
                at_once = trio.CapacityLimiter(AT_ONCE)

                async def one(number: int, patience: float, at_once: trio.CapacityLimiter = at_once) -> None:
                    async with at_once:
                        assert not await leave_early(client, number, patience)

                async with trio.open_nursery() as nursery:
                    for number in range(first, first + 50):
                        nursery.start_soon(one, number, moments.uniform(0.01, 1.0))
                with trio.fail_after(SETTLE):
                    await engine.drained()
                resident.append(resident_megabytes(worker) + resident_megabytes(os.getpid()))
        stats = engine.stats()

        assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)
        assert stats.cached_blocks > 0  # beginnings of prompts that were computed before their clients left
        assert stats.prompt_tokens > REQUESTS
        # Kernels of shapes not met before still come, ever fewer; half a megabyte a request would be a leak.
        assert resident[-1] - resident[2] < 80, resident

        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            messages = [{"role": "user", "content": "What is the capital of France?"}]
            body = {"model": "demo", "messages": messages, "temperature": 0}
            answer = await client.post("/v1/chat/completions", json=body)
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
