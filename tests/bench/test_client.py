"""The client against servers that differ, on a clock that jumps."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import trio

from bench.serve.client import DIALECTS, EventParser, ask, find_model, open_client, probe
from bench.serve.measure import Run, Settings, closed_loop, measure_round, prepare, schedule
from bench.serve.target import BenchError, Target

Respond = Callable[[dict[str, Any]], httpx.Response]
TARGET = Target(label="fake", url="http://fake/v1", model="m")


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def text(content: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}


DONE = event(b"[DONE]")
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
STOP = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})


class Stream(httpx.AsyncByteStream):
    """Bytes that arrive at given times after the request."""

    def __init__(self, *parts: tuple[float, bytes]) -> None:
        self.parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        started = trio.current_time()
        for after, data in self.parts:
            await trio.sleep_until(started + after)
            yield data


def streaming(*parts: tuple[float, bytes]) -> httpx.Response:
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream(*parts))


def client_of(respond: Respond, target: Target = TARGET, seen: list[dict[str, Any]] | None = None) -> httpx.AsyncClient:
    async def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        if seen is not None:
            seen.append(body)
        return respond(body)

    return open_client(target, 4, httpx.MockTransport(handle))


def usage(prompt: int, completion: int, **rest: object) -> bytes:
    return event({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **rest}})


def test_events_come_out_whole_however_they_are_cut() -> None:
    data = event({"a": "\u2028 é"}).replace(b"\\u2028", "\u2028".encode()) + b": comment\r\n\r\ndata: [DONE]\r\n\r\n"
    expected = EventParser().feed(data)

    parser = EventParser()
    pieces = [payload for index in range(len(data)) for payload in parser.feed(data[index : index + 1])]

    assert pieces == expected
    assert expected[1] == b"[DONE]"
    assert json.loads(expected[0]) == {"a": "\u2028 é"}


async def test_times_and_the_servers_own_count(autojump_clock: trio.testing.MockClock) -> None:
    details = {"prompt_tokens_details": {"cached_tokens": 16}}
    parts = [(0.5, ROLE), (2.0, event(text("a"))), (3.0, event(text("b")) + event(text("c"))), (4.0, event(text("d")) + STOP)]
    client = client_of(lambda body: streaming(*parts, (5.0, usage(105, 9, **details) + DONE)))

    sample = await ask(client, TARGET, "hello", 9, {}, 60)

    assert sample.error is None
    assert sample.text == "abcd"
    assert sample.ttft == 2.0  # the role is not text
    assert sample.tpot == pytest.approx(2.0 / 8)
    assert sample.finished - sample.started == 5.0
    assert (sample.output_tokens, sample.counted_by_usage) == (9, True)
    assert (sample.prompt_tokens, sample.cached_tokens) == (105, 16)


async def test_chunks_are_counted_where_the_server_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    client = client_of(lambda body: streaming((1, ROLE + event(text("a"))), (2, event(text("b"))), (3, STOP)))

    sample = await ask(client, TARGET, "hello", 2, {}, 60)

    assert sample.error is None
    assert (sample.output_tokens, sample.counted_by_usage, sample.prompt_tokens) == (2, False, None)


def broken_connection(body: dict[str, Any]) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("respond", "error"),
    [
        (lambda body: httpx.Response(429, text="queue full"), "HTTP 429: queue full"),
        (lambda body: streaming((1, event(text("a")))), "the stream broke off"),
        (lambda body: streaming((1, event({"error": {"message": "worker died"}}))), "worker died"),
        (lambda body: streaming((1, event(b"<html>"))), "a chunk is not JSON"),
        (lambda body: streaming((1, event(text("a"))), (99, DONE)), "no complete answer within 60 s"),
        (broken_connection, "ConnectError: refused"),
    ],
)
async def test_failures_are_counted_not_raised(respond: Respond, error: str, autojump_clock: trio.testing.MockClock) -> None:
    sample = await ask(client_of(respond), TARGET, "hello", 2, {}, 60)

    assert error in (sample.error or "")


async def test_a_request_is_greedy_and_carries_key_dialect_and_own_fields() -> None:
    seen: list[dict[str, Any]] = []
    target = Target(label="fake", url="http://fake/v1", model="m", api_key="sk-1", body={"top_k": 3})
    client = client_of(lambda body: streaming((0, event(text("a", "stop")))), target, seen)

    await ask(client, target, "hello", 7, DIALECTS["full length"], 60)

    assert client.headers["authorization"] == "Bearer sk-1"
    assert seen == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 7,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "top_k": 3,
        }
    ]


@pytest.mark.parametrize(
    ("unknown", "dialect"), [((), "full length"), (("ignore_eos",), "usage"), (("ignore_eos", "stream_options"), "plain")]
)
async def test_probing_finds_what_the_server_knows(unknown: tuple[str, ...], dialect: str) -> None:
    def respond(body: dict[str, Any]) -> httpx.Response:
        if any(name in body for name in unknown):
            return httpx.Response(422, text="unexpected field")
        return streaming((0, event(text("Paris.", "stop"))))

    assert await probe(client_of(respond), TARGET, 60) == (dialect, "Paris.")


@pytest.mark.parametrize("status", [401, 404, 500])
async def test_probing_gives_up_at_once_on_other_errors(status: int) -> None:
    seen: list[dict[str, Any]] = []

    with pytest.raises(BenchError, match=f"HTTP {status}"):
        await probe(client_of(lambda body: httpx.Response(status), seen=seen), TARGET, 60)

    assert len(seen) == 1


async def test_the_first_model_listed_is_taken() -> None:
    client = client_of(lambda body: httpx.Response(200, json={"object": "list", "data": [{"id": "demo"}]}))

    assert await find_model(client, TARGET) == "demo"


@pytest.mark.parametrize(
    "response", [httpx.Response(500), httpx.Response(200, json={"data": []}), httpx.Response(200, text="hi")]
)
async def test_without_a_list_of_models_the_advice_is_to_name_one(response: httpx.Response) -> None:
    with pytest.raises(BenchError, match="name the model: fake="):
        await find_model(client_of(lambda body: response), TARGET)


def echo_server(body: dict[str, Any]) -> httpx.Response:
    """Takes one second to the first token and a tenth for each other; counts words as tokens, and 30 for its template."""
    tokens = body["max_tokens"]
    chunks = [(1 + index / 10, event(text(f"t{index} "))) for index in range(tokens)]
    prompt = 30 + len(body["messages"][0]["content"].split())
    return streaming(*chunks, (1 + (tokens - 1) / 10, STOP + usage(prompt, tokens) + DONE))


async def test_a_closed_loop_keeps_the_concurrency_and_no_more(autojump_clock: trio.testing.MockClock) -> None:
    running: list[int] = [0, 0]  # now, at most

    class Counting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            running[0] += 1
            running[1] = max(running)
            await trio.sleep(1)
            running[0] -= 1
            return streaming((0, event(text("a", "stop"))))

    run = Run(TARGET, open_client(TARGET, 3, Counting()), dialect="plain")
    samples = await closed_loop(run, ["x"] * 9, 3, Settings())

    assert len(samples) == 9
    assert running == [0, 3]
    assert max(sample.finished for sample in samples) - min(sample.started for sample in samples) == 3


async def test_a_measurement_from_probe_to_figures(autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(concurrency=(1, 2), rounds=2, requests=2, prompt_tokens=80, output_tokens=11)
    run = Run(TARGET, client_of(echo_server))

    await prepare(run, settings)
    for concurrency, number, current in schedule([run], settings):
        await measure_round(current, concurrency, number, settings)

    assert run.dialect == "full length"
    assert {concurrency: len(rounds) for concurrency, rounds in run.levels.items()} == {1: 2, 2: 2}
    one, two = run.levels[1][0], run.levels[2][1]
    assert (one.prompt_tokens, one.output_tokens, one.errors) == (80, 11, 0)
    assert one.ttft_p99 == pytest.approx(1)
    assert one.tpot_p50 == pytest.approx(0.1)
    assert one.tokens_per_second == pytest.approx(11 / 2)
    assert two.tokens_per_second == pytest.approx(11)


def test_targets_take_turns_and_change_who_goes_first() -> None:
    runs = [Run(Target(label=label, url="http://h"), client_of(echo_server)) for label in "ab"]
    order = [
        (concurrency, number, run.target.label)
        for concurrency, number, run in schedule(runs, Settings(concurrency=(1, 4), rounds=2))
    ]

    assert order == [(c, n, label) for c in (1, 4) for n, label in ((0, "a"), (0, "b"), (1, "b"), (1, "a"))]


def test_a_round_has_whole_turns_of_the_workers() -> None:
    assert [Settings().requests_at(concurrency) for concurrency in (1, 4, 16)] == [4, 8, 32]
    assert [Settings(requests=10).requests_at(concurrency) for concurrency in (1, 4, 16)] == [10, 12, 16]
