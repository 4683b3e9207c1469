"""The command line: mistakes are one line, and nothing is measured."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.serve.__main__ import levels, make_parser, read_targets
from bench.serve.target import BenchError, Target

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
