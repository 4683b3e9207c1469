"""`bench.parallel`: what it makes of times and texts."""

import json
import math

import pytest

from bench.parallel import report
from bench.parallel.__main__ import make_parser, make_target
from bench.parallel.recovery import Kill, Recovery, after_silence, read_pieces
from dashinfer.bench.exchange import Response
from dashinfer.bench.measure import Run
from dashinfer.bench.stats import Sample, summarise
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


def test_the_next_token_ends_the_longest_silence_after_the_kill():
    times = [1.0, 1.1, 1.2, 1.3, 3.8, 3.9]

    assert after_silence(times, 1.25) == (3.8, 2.5)  # what came at 1.3 had been under way


@pytest.mark.parametrize("killed", [0.5, 2.0])
def test_a_kill_beside_the_stream_is_none(killed):
    with pytest.raises(BenchError, match="did not hit a running stream"):
        after_silence([1.0, 1.1, 1.2], killed)


def test_pieces_of_text_and_when_they_came():
    body = [(1.0, event("")), (2.0, event("a")[:9]), (2.5, event("a")[9:] + event("b")), (3.0, b"data: [DONE]\n\n")]

    assert read_pieces(Response(status=200, body=body)) == [(2.5, "a"), (2.5, "b")]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (Response(status=503), "HTTP 503"),
        (Response(status=200, error="the server closed"), "the server closed"),
        (Response(status=200, body=[(1.0, event("a"))]), "broke off"),
        (Response(status=200, body=[(1.0, b'data: {"error": {"message": "lost"}}\n')]), "lost"),
    ],
)
def test_a_stream_that_failed_is_no_figure(response, message):
    with pytest.raises(BenchError, match=message):
        read_pieces(response)


def make_run(label: str, tpot: float) -> Run:
    samples = [Sample(started=0.0, first=1.0, last=1.0 + 10 * tpot, finished=2.0, output_tokens=11)]
    return Run(Target(label=label, url="http://h/v1"), levels={1: [summarise(samples)]})


def test_rows():
    runs = [make_run("tp1", 0.020), make_run("tp2", 0.0235)]
    kills = [Kill(seconds=seconds, silence=seconds, same=True) for seconds in (1.0, 2.0, 3.4)]
    recoveries = [
        Recovery(label="tp1", ranks=1, weights=0.5, start=1.5, kills=kills),
        Recovery(label="tp2", ranks=2, weights=0.3, start=1.75, kills=kills),
    ]

    assert report.rows(runs, recoveries) == [
        ("1", "20.0", "", "1.50", "0.50", "2.00 (3.40 of 3)", "3.50: kept", "3 of 3"),
        ("2", "23.5", "+3.5", "1.75", "0.30", "2.00 (3.40 of 3)", "3.30: MISSED", "3 of 3"),
    ]
    assert [each["holds"] for each in report.as_json(recoveries)] == [True, False]


def test_another_answer_misses_the_mark():
    recovery = Recovery(label="tp1", ranks=1, weights=0.5, start=1.5, kills=[Kill(seconds=1.0, silence=1.0, same=False)])

    assert not recovery.holds


def test_without_kills_and_without_steps():
    run = Run(Target(label="tp1", url="http://h/v1"), levels={1: [summarise([Sample(started=0.0, finished=1.0, error="no")])]})
    recovery = Recovery(label="tp1", ranks=1, weights=0.5, start=1.5)
    (row,) = report.rows([run], [recovery])

    assert all(map(math.isnan, report.step_overhead(run, run)))
    assert row[-3:] == ("-", "-", "-")
    assert report.as_json([recovery])[0]["holds"] is None


def test_the_server_it_starts():
    target, command = make_target(make_parser().parse_args(["--model", "a b"]), 2)

    assert target.label == "tp2"
    assert (
        " -m dashinfer.serving --model 'a b' --device cpu --data-type float32 --tensor-parallel 2 --host 127.0.0.1" in command
    )
    assert command.endswith(f"--port {target.url[len('http://127.0.0.1:') : -len('/v1')]}")
