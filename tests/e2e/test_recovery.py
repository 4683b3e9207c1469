"""A server whose worker is killed in the midst of streams: nobody who reads them can tell."""

import json
import os
import signal
import threading
import time

import httpx
import pytest

from .conftest import ServerProcess

pytestmark = pytest.mark.feature("Parallelism and recovery", "Streams outlive dead and hanging workers")

PATIENCE = 60.0  # seconds
REQUESTS = [
    {"messages": [{"role": "user", "content": content}], "max_tokens": 24, "ignore_eos": True, **sampling}
    for content, sampling in (
        ("Tell me a long story about a sailor.", {"temperature": 0}),
        ("What is the capital of France, and why?", {"temperature": 0, "logprobs": True}),
        ("Name ten animals.", {"temperature": 0.9, "seed": 5, "frequency_penalty": 0.5, "n": 2}),
        ("Count from one to forty in words.", {"temperature": 0.7, "seed": 6, "top_p": 0.9, "repetition_penalty": 1.1}),
    )
]


def read(
    server: ServerProcess, number: int, texts: dict[tuple[int, int], str], begun: threading.Semaphore | None = None
) -> None:
    """Stream a request. `begun` is released at its sixth token or so."""
    body = {"model": "demo", "stream": True, "stream_options": {"include_usage": True}, **REQUESTS[number]}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE) as response:
        events = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: "))
        for count, event in enumerate(events):
            if count == 6 and begun is not None:
                begun.release()
            if event == "[DONE]":
                texts[number, -1] = event
                continue
            chunk = json.loads(event)
            if chunk["usage"]:
                texts[number, -2] = str(chunk["usage"]["completion_tokens"])
            for choice in chunk["choices"]:
                key = number, choice["index"]
                texts[key] = texts.get(key, "") + (choice["delta"].get("content") or "")


def read_all(server: ServerProcess, begun: threading.Semaphore | None = None) -> tuple[list[threading.Thread], dict]:
    texts: dict[tuple[int, int], str] = {}
    threads = [threading.Thread(target=read, args=(server, number, texts, begun)) for number in range(len(REQUESTS))]
    for thread in threads:
        thread.start()
    return threads, texts


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def until(server: ServerProcess, status: str) -> None:
    """Wait for what /health says."""
    deadline = time.monotonic() + PATIENCE
    while (health := httpx.get(f"{server.url}/health")).json()["status"] != status:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert health.status_code == (200 if status == "ok" else 503)


def test_streams_outlive_their_worker(demo):
    server = ServerProcess.start(
        "--model", "demo", "--data-type", "float32", "--kv-cache-memory", "256MiB", "--max-length", "1024"
    )
    threads, undisturbed = read_all(server)
    join(threads)
    begun = threading.Semaphore(0)
    threads, texts = read_all(server, begun)
    for _ in threads:
        assert begun.acquire(timeout=PATIENCE)
    (worker,) = server.worker_pids
    os.kill(worker, signal.SIGKILL)
    until(server, "recovering")
    late: dict[tuple[int, int], str] = {}
    read(server, 0, late)  # asked while there is no worker
    until(server, "ok")
    join(threads)

    assert texts == undisturbed
    assert texts[0, -1] == "[DONE]"
    assert late == {key: text for key, text in undisturbed.items() if key[0] == 0}
    assert any("was killed by SIGKILL" in line for line in server.lines)
    assert any("workers are ready again after" in line for line in server.lines)
    assert server.worker_pids != [worker]
    assert server.stop() == 0
