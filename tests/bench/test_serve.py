"""`python -m bench.serve`: `dashinfer_bench` with servers that it starts."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.serve.__main__ import make_parser, read_pids
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

from . import small_server

ROOT = Path(__file__).parents[2]
TARGETS = [Target(label="a", url="http://a/v1")]


def test_processes_of_targets() -> None:
    assert read_pids(make_parser().parse_args(["--pid", "a=12"]), TARGETS) == {"a": 12}


@pytest.mark.parametrize(("pid", "message"), [("b=12", "'b' is no target"), ("a=x", "'x' is not a process id")])
def test_processes_that_cannot_be_are_refused(pid: str, message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_pids(make_parser().parse_args(["--pid", pid]), TARGETS)


@pytest.mark.parametrize(
    ("answered", "said"),
    [
        (0, "interrupted before anything was measured"),
        (8, "interrupted: the tables have what was answered until then"),  # start 1, probe 2, calibrate 1, warm-up 1
    ],
)
def test_sigterm_ends_what_was_started_too(answered: int, said: str, tmp_path: Path) -> None:
    port = small_server.free_port()
    server = ["--spawn", f"server={small_server.command(port, answered)}"]
    arguments = ["--url", f"http://127.0.0.1:{port}", "--model", "m", *server, "--concurrency", "1"]

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
