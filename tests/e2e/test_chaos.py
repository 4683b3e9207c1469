"""Ranks that are killed and stopped at random while sixteen streams run: no client sees it, but for the time it takes."""

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trio

from tests.e2e.conftest import ServerProcess
from tests.e2e.prompts import PROMPTS

pytestmark = pytest.mark.feature("Parallelism and recovery", "Streams outlive dead and hanging workers")

STREAMS = 16
INTERVAL = 3.0  # seconds from one fault to the next
DURATION = 60.0  # seconds of faults
TOKENS = 200
PATIENCE = 240.0  # seconds that the streams may take once the faults have ended
SETTLE = 10.0  # seconds


@pytest.fixture(scope="module")
def parallel(demo) -> Iterator[ServerProcess]:
    server = ServerProcess.start(
        *("--model", "demo", "--device", "cpu", "--data-type", "float32", "--tensor-parallel", "2"),
        *("--max-length", "1024", "--kv-cache-memory", "64MiB", "--max-batch", str(STREAMS)),
        *("--max-restarts", "1000", "--heartbeat-timeout", "2"),
    )
    yield server
    assert server.stop() == 0


def request(number: int) -> dict:
    """Half of them are greedy, half draw and are penalised; what they say depends on all tokens before."""
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(PROMPTS[number])]
    body = {"model": "demo", "messages": messages, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    if number % 2:
        return body | {"temperature": 0.9, "top_p": 0.9, "seed": number, "frequency_penalty": 0.3}
    return body | {"temperature": 0}


async def read(client: httpx.AsyncClient, number: int, texts: dict[int, str]) -> None:
    pieces, usage, ended = [], None, False
    async with client.stream("POST", "/v1/chat/completions", json=request(number)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not line.startswith("data:"):
                continue
            if (data := line.removeprefix("data:").strip()) == "[DONE]":
                ended = True
                continue
            event = json.loads(data)
            assert "error" not in event, event
            usage = event.get("usage") or usage
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
    assert ended
    assert usage is not None
    assert usage["completion_tokens"] == TOKENS
    texts[number] = "".join(pieces)


async def read_all(url: str) -> dict[int, str]:
    texts: dict[int, str] = {}
    limits = httpx.Limits(max_connections=STREAMS)
    async with (
        httpx.AsyncClient(base_url=url, timeout=DURATION + PATIENCE, limits=limits) as client,
        trio.open_nursery() as nursery,
    ):
        for number in range(STREAMS):
            nursery.start_soon(read, client, number, texts)
    return texts


async def disturb(server: ServerProcess, chance: random.Random) -> int:
    """Returns how many faults there were."""
    faults = 0
    with trio.move_on_after(DURATION):
        while True:
            await trio.sleep(INTERVAL)
            if pids := server.worker_pids:
                try:
                    os.kill(chance.choice(pids), chance.choice((signal.SIGKILL, signal.SIGSTOP)))
                except ProcessLookupError:
                    continue
                faults += 1
    return faults


def count_open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def health(client: httpx.AsyncClient) -> dict:
    return (await client.get("/health")).json()


async def test_streams_go_on_while_ranks_are_killed_and_stopped(parallel):
    server = parallel
    undisturbed = await read_all(server.url)
    ranks = len(server.worker_pids)
    open_files = count_open_files(server.process.pid)
    texts: dict[int, str] = {}
    faults = 0

    async def all_streams() -> None:
        texts.update(await read_all(server.url))

    with trio.fail_after(DURATION + PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_streams)
            faults = await disturb(server, random.Random(6))

    assert faults > DURATION / INTERVAL / 2
    assert texts == undisturbed
    async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
        with trio.fail_after(PATIENCE):
            while (await health(client))["status"] != "ok":
                await trio.sleep(0.2)
        metrics = (await client.get("/metrics")).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert re.search(rf"^dashinfer:{name}{{.*}} 0\.0$", metrics, re.MULTILINE), metrics
    with trio.fail_after(SETTLE):
        while len(server.worker_pids) != ranks or count_open_files(server.process.pid) > open_files:
            await trio.sleep(0.1)
    assert server.process.poll() is None
