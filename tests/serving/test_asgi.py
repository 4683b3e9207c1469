"""The ASGI target under a plain Hypercorn."""

import os
import signal
import sys
from pathlib import Path

import httpx
import pytest

from dashinfer.errors import EngineUnavailable
from dashinfer.serving.asgi import Application, app

from .process import HERE, PATIENCE, Process, free_port, running


def command(port: int, workers: int = 1) -> list[str]:
    """With no worker processes Hypercorn serves in its own, and its exit status tells of a failure."""
    hypercorn = str(Path(sys.executable).with_name("hypercorn"))
    return [hypercorn, "--worker-class", "trio", "--workers", str(workers), "--bind", f"127.0.0.1:{port}", "fake_asgi:app"]


def environment(folder: Path, model: str = "demo") -> dict[str, str]:
    path = os.pathsep.join([str(HERE), *sys.path])
    return {"DASHINFER_MODEL": model, "DASHINFER_API_KEYS": "sk-1", "FAKE_FOLDER": str(folder), "PYTHONPATH": path}


def chat(url: str, content: str) -> httpx.Response:
    body = {"model": "demo", "messages": [{"role": "user", "content": content}]}
    headers = {"authorization": "Bearer sk-1"}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE)


def start(server: Process, port: int) -> str:
    server.wait_for("ready: demo")
    return f"http://127.0.0.1:{port}"


def test_serves_and_ends(tmp_path: Path) -> None:
    port = free_port()
    with running(command(port), **environment(tmp_path), DASHINFER_DRAIN_TIMEOUT="0.3") as server:
        url = start(server, port)
        answer = chat(url, "say hello")
        closed = httpx.get(f"{url}/v1/models")
        headers, body = {"authorization": "Bearer sk-1"}, {"model": "demo", "input": "wait ab", "background": True}
        begun = httpx.post(f"{url}/v1/responses", json=body, headers=headers, timeout=PATIENCE)
        server.signal(signal.SIGTERM)
        server.wait_for(f"{begun.json()['id']} in the background: cut off")
        status = server.end()

    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    assert closed.status_code == 401
    assert status == 0
    assert "Traceback" not in "\n".join(server.said)


def test_loading_does_not_hold_the_start_up(tmp_path: Path) -> None:
    port = free_port()
    with running(command(port), **environment(tmp_path, "never-loads")) as server:
        server.wait_for("Running on")
        health = httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE)
        server.signal(signal.SIGTERM)
        status = server.end()

    assert (health.status_code, health.json()) == (503, {"status": "loading", "mode": None})
    assert status == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_engine_that_dies_ends_the_server(tmp_path: Path, workers: int) -> None:
    port = free_port()
    with running(command(port, workers), **environment(tmp_path)) as server:
        url = start(server, port)
        answer = chat(url, "crash")
        status = server.end()

    assert answer.status_code == 500
    assert workers or status == -signal.SIGTERM
    assert any("rank 0 died with signal 9; ending the process" in line for line in server.said)


def test_a_bad_environment_fails_the_start(tmp_path: Path) -> None:
    bad = {**environment(tmp_path), "DASHINFER_MAX_BATCH": "many"}
    with running(command(free_port(), workers=0), **bad) as server:
        status = server.end()

    assert status != 0
    assert any("DASHINFER_MAX_BATCH" in line for line in server.said)


async def test_without_a_lifespan_it_says_so() -> None:
    assert isinstance(app, Application)
    with pytest.raises(EngineUnavailable, match="lifespan"):
        await Application()({"type": "http"}, None, None)
