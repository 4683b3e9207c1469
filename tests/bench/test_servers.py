"""Servers as processes: a small one, started and ended for real."""

import shlex
import socket
import sys
from pathlib import Path

import psutil
import pytest

from bench.serve.servers import read_memory, running
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

# Answers every request with one event, has a child, and dies of SIGTERM without caring for it.
SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b'data: {"choices": [{"delta": {"content": "Paris"}, "finish_reason": "stop"}]}\\n\\n'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def target() -> Target:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Target(label="small", url=f"http://127.0.0.1:{port}", model="m")


async def test_a_server_is_started_timed_and_ended_with_its_children(target: Target, tmp_path: Path) -> None:
    port = target.url.rsplit(":", 1)[1]
    command = shlex.join([sys.executable, "-c", SERVER, port])
    async with running(command, target, tmp_path / "log", 60) as (pid, seconds):
        memory = read_memory(pid)
        family = [psutil.Process(pid), *psutil.Process(pid).children()]

    assert 0 < seconds < 60
    assert memory is not None
    assert memory["parent"] > 2**20
    assert len(memory["workers"]) == 1
    assert len(family) == 2
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert read_memory(pid) is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{sys.executable} -c 'raise SystemExit(3)'", "ended with status 3 before it answered; see .*log"),
        ("/no/such/command", "cannot start small"),
    ],
)
async def test_a_server_that_does_not_start_is_one_clear_line(
    target: Target, tmp_path: Path, command: str, message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        async with running(command, target, tmp_path / "log", 60):
            raise AssertionError("it runs")
