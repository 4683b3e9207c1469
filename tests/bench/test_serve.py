"""`python -m bench.serve`: `dashinfer_bench` with servers that it starts."""

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.serve.__main__ import make_parser, read_pids
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

ROOT = Path(__file__).parents[2]
TARGETS = [Target(label="a", url="http://a/v1")]


def test_processes_of_targets() -> None:
    assert read_pids(make_parser().parse_args(["--pid", "a=12"]), TARGETS) == {"a": 12}


@pytest.mark.parametrize(("pid", "message"), [("b=12", "'b' is no target"), ("a=x", "'x' is not a process id")])
def test_processes_that_cannot_be_are_refused(pid: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_pids(make_parser().parse_args(["--pid", pid]), TARGETS)


# Lists a model and answers three requests; each answer is one event. Then it ends its parent.
SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    left = int(sys.argv[2])
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if not Handler.left:
            os.kill(os.getppid(), signal.SIGTERM)  # in the midst of a request
            return
        Handler.left -= 1
        body = b'data: {"choices": [{"delta": {"content": "Paris"}, "finish_reason": "stop"}]}\\n\\n'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (0, "interrupted before anything was measured"),
        (8, "interrupted: the tables have what was answered until then"),  # start 1, probe 2, calibrate 1, warm-up 1
    ],
)
def test_sigterm_ends_what_was_started_too(answered: int, said: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shlex.join([sys.executable, "-c", SERVER, str(port), str(answered)])
    arguments = ["--url", f"http://127.0.0.1:{port}", "--model", "m", "--spawn", f"server={command}", "--concurrency", "1"]

    result = subprocess.run(
        [sys.executable, "-m", "bench.serve", *arguments, "--out", str(tmp_path / "out.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert said in result.stdout + result.stderr
    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out.json").exists() == bool(answered)
    with socket.socket() as again:  # nobody listens any more
        assert again.connect_ex(("127.0.0.1", port)) != 0
