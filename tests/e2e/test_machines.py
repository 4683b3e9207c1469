"""One model over two machines, which are network namespaces of this one, joined by a cable that can be pulled."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import which
from typing import Any

import httpx
import pytest

from tests.process_tree import workers_of
from tests.serving.process import Process, running

pytestmark = pytest.mark.feature("Parallelism and recovery", "Several machines")

SECRET = "only for this test"
HEARTBEAT_TIMEOUT = 3.0  # seconds
TOKENS = 150  # of an answer
PATIENCE = 60.0  # seconds
_CLONE_NEWNET = 0x40000000
QUESTION = {"role": "user", "content": "Who are you?"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Machines:
    """Two network namespaces, with the addresses 10.0.0.1 and 10.0.0.2 of a link between them."""

    def __init__(self) -> None:
        self.names = [f"dashinfer-{os.getpid()}-{number}" for number in range(2)]

    def lay_cable(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        one, other = self.names
        ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other)
        for number, name in enumerate(self.names, 1):
            ip("-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def command(self, number: int) -> list[str]:
        """The server's, on one of them."""
        flags = ["--model", "demo-vlm", "--mode", "llm", "--device", "cpu", "--data-type", "float32", "--port", "0"]
        flags += ["--tensor-parallel", "2", "--nnodes", "2", "--node-rank", str(number), "--master-addr", "10.0.0.1"]
        flags += ["--kv-cache-memory", "16MiB", "--heartbeat-timeout", str(HEARTBEAT_TIMEOUT), "--host", "127.0.0.1"]
        return ["ip", "netns", "exec", self.names[number], sys.executable, "-m", "dashinfer.serving", *flags]

    def pull_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "down")

    def plug_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", "cable", "up")

    def on_first(self, work: Callable[[], Any]) -> "Inside":
        """Do this with the network of the machine that takes the requests."""
        return Inside(self.names[0], work)


class Inside(threading.Thread):
    """Something that is done inside of a network namespace, to which a thread can belong."""

    def __init__(self, namespace: str, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._namespace = namespace
        self._work = work
        self._result: Any = AssertionError("it takes too long")
        self.start()

    def run(self) -> None:
        try:
            with open(f"/run/netns/{self._namespace}") as file:
                status = ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET)
            assert status == 0, os.strerror(ctypes.get_errno())
            self._result = self._work()
        except BaseException as error:
            self._result = error

    def result(self) -> Any:
        self.join(PATIENCE)
        if isinstance(self._result, BaseException):
            raise self._result
        return self._result


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    if sys.platform != "linux" or which("ip") is None:
        pytest.skip("needs ip, of iproute2")
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    machines = Machines()
    try:
        machines.lay_cable()
    except subprocess.CalledProcessError as error:
        machines.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield machines
    machines.remove()


def ask(server: Process, tokens: int, begun: threading.Event) -> str:
    """Text of a greedy answer of so many tokens; `begun` is set when there is some."""
    body = {
        "model": "demo-vlm",
        "messages": [QUESTION],
        "temperature": 0,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
    }
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"stream": True}, timeout=PATIENCE) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content") or ""
                if text:
                    begun.set()
    assert line == "data: [DONE]" or not line
    return text


def health(server: Process) -> str:
    return httpx.get(f"{server.url}/health", timeout=PATIENCE).json()["status"]


def workers(process: Process) -> list[int]:
    return workers_of(process._child.pid)


def seconds_until(condition: Callable[[], bool], limit: float) -> float:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + limit
        time.sleep(0.02)
    return time.monotonic() - begun


def test_a_model_over_two_machines(machines: Machines) -> None:
    """A wrong secret is refused; a cut link is noticed, and mended when it returns, and no character is lost; workers end with
    machine 0."""
    secret = {"DASHINFER_CLUSTER_SECRET": SECRET}
    with running(machines.command(0), **secret) as server:
        server.wait_for("waiting for machine 1")
        with running(machines.command(1), DASHINFER_CLUSTER_SECRET="another") as stranger:
            assert stranger.end() == 2
        assert stranger.said[-1] == "dashinfer_serve: error: machine 0 has another --cluster-secret"
        server.wait_for("10.0.0.2 is refused: it has another --cluster-secret")

        with running(machines.command(1), **secret) as other:
            server.wait_ready()
            assert len(workers(server)) == len(workers(other)) == 1
            begun = threading.Event()
            undisturbed = machines.on_first(lambda: ask(server, TOKENS, begun)).result()
            begun.clear()

            [rank] = workers(other)
            stream = machines.on_first(lambda: ask(server, TOKENS, begun))
            assert begun.wait(PATIENCE)
            machines.pull_cable()
            noticed = seconds_until(lambda: machines.on_first(lambda: health(server)).result() == "recovering", 10)
            killed = noticed + seconds_until(lambda: not Path(f"/proc/{rank}").exists(), 10)
            machines.plug_cable()
            server.wait_for(r"rank 1 on machine 1 is lost: no sign of life for 3 s.*; workers start again")
            server.wait_for("workers are ready again")
            assert stream.result() == undisturbed != ""
            assert noticed < HEARTBEAT_TIMEOUT + 2
            assert killed < HEARTBEAT_TIMEOUT + 2 + 2

            [rank] = workers(other)
            server.signal(signal.SIGKILL)
            assert seconds_until(lambda: not Path(f"/proc/{rank}").exists(), 10) < 2
            other.wait_for("waiting for machine 0 at 10.0.0.1:29500")
            other.signal(signal.SIGTERM)
            assert other.end() == 0
