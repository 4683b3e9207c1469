"""Targets and their fields from the command line."""

import pytest

from dashinfer.bench.target import Target, parse_body, parse_header, parse_target
from dashinfer.errors import BenchError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=http://h:1/v1", Target(label="a", url="http://h:1/v1")),
        ("a=http://h:1/v1/", Target(label="a", url="http://h:1/v1")),
        ("a=https://h/v1=org/model", Target(label="a", url="https://h/v1", model="org/model")),
        ("a=http://h:1", Target(label="a", url="http://h:1/v1")),
        ("a=http://h:1/=m", Target(label="a", url="http://h:1/v1", model="m")),
        ("a=http://h:1/api/openai/", Target(label="a", url="http://h:1/api/openai")),
    ],
)
def test_targets(text: str, expected: Target) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize("text", ["http://h/v1", "=http://h/v1", "a=", "a=h:8000/v1", "a=http:///v1", "a=http://[h/v1", ""])
def test_bad_targets_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="write LABEL="):
        parse_target(text)


def test_bodies() -> None:
    assert parse_body('a={"seed": 1}') == ("a", {"seed": 1})
    assert parse_body(' {"a=": 1}') == (None, {"a=": 1})


@pytest.mark.parametrize("text", ["a={", "a=[1]", "{a}", "[1]"])
def test_bad_bodies_are_refused(text: str) -> None:
    with pytest.raises(BenchError):
        parse_body(text)


def test_headers() -> None:
    assert parse_header("X-Tenant: a:b ") == ("X-Tenant", "a:b")
    for text in ("X-Tenant", ": a"):
        with pytest.raises(BenchError, match="write NAME:VALUE"):
            parse_header(text)
