"""The command line: mistakes are one line, and nothing is measured."""

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.serve.__main__ import levels, make_parser, read_targets
from dashinfer.bench.target import BenchError, Target

ROOT = Path(__file__).parents[2]


def test_one_url_or_many_targets() -> None:
    arguments = make_parser().parse_args(
        ["--target", "a=http://a/v1=x", "--url", "http://b/v1", "--model", "y", "--label", "b", "--body", 'a={"k": 1}']
    )

    assert read_targets(arguments) == [
        Target(label="a", url="http://a/v1", model="x", body={"k": 1}),
        Target(label="b", url="http://b/v1", model="y"),
    ]
    assert levels("1,4,4,16") == (1, 4, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--target", "a=http://a", "--target", "a=http://b"], "same label"),
        (["--url", "http://b", "--body", "a={}"], "'a' is no target; there are server"),
        (["--url", "http://b", "--api-key-from", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE is not set"),
    ],
)
def test_targets_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(BenchError, match=message):
        read_targets(make_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9/v1"], "bench.serve: server does not list its models"),
        (["--url", "http://127.0.0.1:9/v1", "--model", "m"], "bench.serve: server does not answer: ConnectError"),
        (["--url", "http://h/v1", "--out", "x.txt"], "bench.serve: --out x.txt does not end in .json"),
        (["--url", "http://h/v1", "--concurrency", "1,x"], "not a list of numbers such as 1,4,16"),
    ],
)
def test_the_command_fails_in_one_line(arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.serve", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )

    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


SERVER = """
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        os.kill(os.getppid(), signal.SIGTERM)  # in the midst of the first request
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_sigterm_ends_what_was_started_too(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shlex.join([sys.executable, "-c", SERVER, str(port)])
    arguments = ["--url", f"http://127.0.0.1:{port}", "--model", "m", "--spawn", f"server={command}"]

    result = subprocess.run(
        [sys.executable, "-m", "bench.serve", *arguments, "--out", str(tmp_path / "out.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert result.returncode == 130
    assert "Traceback" not in result.stderr
    with socket.socket() as again:  # nobody listens any more
        assert again.connect_ex(("127.0.0.1", port)) != 0
