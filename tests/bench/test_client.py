"""The client against servers that differ, on a clock that jumps."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio

from dashinfer.bench.client import DIALECTS, EventParser, ask, find_model, probe
from dashinfer.bench.exchange import Connect
from dashinfer.bench.measure import Run, measure_round, prepare, schedule
from dashinfer.bench.settings import Settings
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

Parts = list[tuple[float, bytes]]  # seconds after the request, bytes
Respond = Callable[[dict[str, Any]], Parts]
TARGET = Target(label="fake", url="http://fake/v1", model="m")


def event(data: object) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


def text(content: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}


DONE = event(b"[DONE]")
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
STOP = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def streaming(*parts: tuple[float, bytes]) -> Parts:
    """An answer in chunks; the connection stays open after it."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return [(0, head), *((after, chunk(data)) for after, data in parts), (max(after for after, _ in parts), b"0\r\n\r\n")]


def plain(status: int, data: bytes = b"") -> Parts:
    return [(0, b"HTTP/1.1 %d Said\r\ncontent-length: %d\r\n\r\n%s" % (status, len(data), data))]


class Server(trio.abc.Stream):
    """The client's end of a connection to a server that reads one request and answers in parts, at their times."""

    def __init__(self, respond: Respond, heads: list[bytes]) -> None:
        self.respond = respond
        self.heads = heads
        self.parts: Parts | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        self.heads.append(head)
        self.started = trio.current_time()
        self.parts = list(self.respond(json.loads(body) if body else {}))

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        assert self.parts is not None, "a request comes first"
        if not self.parts:
            await trio.sleep_forever()
        after, data = self.parts.pop(0)
        await trio.sleep_until(self.started + after)
        return data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


def server(respond: Respond, seen: list[dict[str, Any]] | None = None, heads: list[bytes] | None = None) -> Connect:
    def answer(body: dict[str, Any]) -> Parts:
        if seen is not None:
            seen.append(body)
        return respond(body)

    async def connect(url: str) -> trio.abc.Stream:
        return Server(answer, [] if heads is None else heads)

    return connect


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
    connect = server(lambda body: streaming(*parts, (5.0, usage(105, 9, **details) + DONE)))

    sample = await ask(TARGET, "hello", 9, {}, 60, connect)

    assert sample.error is None
    assert sample.text == "abcd"
    assert sample.ttft == 2.0  # the role is not text
    assert sample.tpot == pytest.approx(2.0 / 8)
    assert sample.gaps == (1.0, 0.0, 1.0)  # b and c came together
    assert sample.finished - sample.started == 5.0
    assert (sample.output_tokens, sample.counted_by_usage) == (9, True)
    assert (sample.prompt_tokens, sample.cached_tokens) == (105, 16)


async def test_chunks_are_counted_where_the_server_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    connect = server(lambda body: streaming((1, ROLE + event(text("a"))), (2, event(text("b"))), (3, STOP)))

    sample = await ask(TARGET, "hello", 2, {}, 60, connect)

    assert sample.error is None
    assert (sample.output_tokens, sample.counted_by_usage, sample.prompt_tokens) == (2, False, None)


def torn(body: dict[str, Any]) -> Parts:
    return [*streaming((1, event(text("a"))))[:-1], (2, b"")]


@pytest.mark.parametrize(
    ("respond", "error"),
    [
        (lambda body: plain(429, b"queue full"), "HTTP 429: queue full"),
        (lambda body: streaming((1, event(text("a")))), "the stream broke off"),
        (lambda body: streaming((1, event({"error": {"message": "worker died"}}))), "worker died"),
        (lambda body: streaming((1, event(b"<html>"))), "a chunk is not JSON"),
        (lambda body: streaming((1, event(text("a"))), (99, DONE)), "no complete answer within 60 s"),
        (lambda body: streaming((1, event(b"3"))), "a chunk is not an object"),
        (lambda body: streaming((1, event({"choices": [None]}))), "a chunk has another shape than OpenAI's"),
        (lambda body: streaming((1, event({"choices": [{"delta": "a"}]}))), "a chunk has another shape than OpenAI's"),
        (lambda body: streaming((1, event({"choices": 1}))), "a chunk has another shape than OpenAI's"),
        (lambda body: streaming((1, event({"usage": [9]}))), "a chunk has another shape than OpenAI's"),
        (lambda body: streaming((1, event(text([{"type": "text"}])))), "a chunk has another shape than OpenAI's"),
        (torn, "RemoteProtocolError: peer closed connection"),
        (lambda body: [(1, b"")], "RemoteProtocolError: the server closed the connection without an answer"),
        (lambda body: [(1, b"SSH-2.0-x\r\n\r\n")], "RemoteProtocolError: "),
    ],
)
async def test_failures_are_counted_not_raised(respond: Respond, error: str, autojump_clock: trio.testing.MockClock) -> None:
    sample = await ask(TARGET, "hello", 2, {}, 60, server(respond))

    assert error in (sample.error or "")


async def test_a_request_is_greedy_and_carries_key_dialect_and_own_fields() -> None:
    seen: list[dict[str, Any]] = []
    target = Target(label="fake", url="http://fake/v1", model="m", api_key="sk-1", body={"top_k": 3})
    heads: list[bytes] = []
    connect = server(lambda body: streaming((0, event(text("a", "stop")))), seen, heads)

    await ask(target, "hello", 7, DIALECTS["full length"], 60, connect)

    line, *fields = heads[0].split(b"\r\n")
    assert line == b"POST /v1/chat/completions HTTP/1.1"
    assert {b"Host: fake", b"Authorization: Bearer sk-1", b"Content-Type: application/json", b"Connection: close"} < set(fields)
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
    def respond(body: dict[str, Any]) -> Parts:
        if any(name in body for name in unknown):
            return plain(422, b"unexpected field")
        return streaming((0, event(text("Paris.", "stop"))))

    assert await probe(TARGET, 60, server(respond)) == (dialect, "Paris.")


@pytest.mark.parametrize("status", [401, 404, 500])
async def test_probing_gives_up_at_once_on_other_errors(status: int) -> None:
    seen: list[dict[str, Any]] = []

    with pytest.raises(BenchError, match=f"HTTP {status}"):
        await probe(TARGET, 60, server(lambda body: plain(status), seen))

    assert len(seen) == 1


async def test_the_first_model_listed_is_taken() -> None:
    connect = server(lambda body: plain(200, b'{"object": "list", "data": [{"id": "demo"}]}'))

    assert await find_model(TARGET, 60, connect) == "demo"


@pytest.mark.parametrize("response", [plain(500), plain(200, b'{"data": []}'), plain(200, b"hi"), [(0.0, b"")]])
async def test_without_a_list_of_models_the_advice_is_to_name_one(response: Parts) -> None:
    with pytest.raises(BenchError, match="name the model: --model MODEL, or fake="):
        await find_model(TARGET, 60, server(lambda body: response))


def echo_server(body: dict[str, Any]) -> Parts:
    """Takes one second to the first token and a tenth for each other; counts words as tokens, and 30 for its template."""
    tokens = body["max_tokens"]
    chunks = [(1 + index / 10, event(text(f"t{index} "))) for index in range(tokens)]
    prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
    return streaming(*chunks, (1 + (tokens - 1) / 10, STOP + usage(30 + len(prompt.split()), tokens) + DONE))


async def test_a_closed_loop_keeps_the_concurrency_and_no_more(autojump_clock: trio.testing.MockClock) -> None:
    running: list[int] = [0, 0]  # now, at most

    def respond(body: dict[str, Any]) -> Parts:
        running[0] += 1
        running[1] = max(running)
        return streaming((1, event(text("a", "stop"))))

    def ended() -> None:
        running[0] -= 1

    run = Run(TARGET, dialect="plain", connect=server(respond))
    figures = await measure_round(run, 3, 0, Settings(requests=9), ended)

    assert figures.requests == 9
    assert running == [0, 3]
    assert figures.requests_per_second == 3


async def test_a_measurement_from_probe_to_figures(autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(concurrency=(1, 2), rounds=2, requests=2, prompt_tokens=80, output_tokens=11)
    run = Run(TARGET, connect=server(echo_server))

    await prepare(run, settings)
    for concurrency, number, current in schedule([run], settings):
        await measure_round(current, concurrency, number, settings)

    assert run.dialect == "full length"
    assert {concurrency: len(rounds) for concurrency, rounds in run.levels.items()} == {1: 2, 2: 2}
    one, two = run.levels[1][0], run.levels[2][1]
    assert (one.prompt_tokens, one.output_tokens, one.errors) == (80, 11, 0)
    assert one.times["ttft_p99"] == pytest.approx(1)
    assert one.times["tpot_p50"] == pytest.approx(0.1)
    assert one.times["itl_p50"] == pytest.approx(0.1)
    assert one.times["e2e_p90"] == pytest.approx(2)
    assert one.tokens_per_second == pytest.approx(11 / 2)
    assert two.tokens_per_second == pytest.approx(11)


def test_targets_take_turns_and_change_who_goes_first() -> None:
    runs = [Run(Target(label=label, url="http://h")) for label in "ab"]
    order = [
        (concurrency, number, run.target.label)
        for concurrency, number, run in schedule(runs, Settings(concurrency=(1, 4), rounds=2))
    ]

    assert order == [(c, n, label) for c in (1, 4) for n, label in ((0, "a"), (0, "b"), (1, "b"), (1, "a"))]


def test_a_round_has_whole_turns_of_the_workers() -> None:
    assert [Settings().requests_at(concurrency) for concurrency in (1, 4, 16)] == [4, 8, 32]
    assert [Settings(requests=10).requests_at(concurrency) for concurrency in (1, 4, 16)] == [10, 12, 16]
    assert Settings(duration=1.0).requests_at(4) is None


def test_a_round_of_an_open_loop_is_ten_seconds_worth() -> None:
    rates = (0.1, 2.5, float("inf"))

    assert [Settings(request_rate=rates).requests_at(rate) for rate in rates] == [4, 25, 64]
    assert [Settings(request_rate=rates, requests=10).requests_at(rate) for rate in rates] == [10, 10, 10]


async def test_completions_are_asked_with_a_prompt_and_read_from_text(autojump_clock: trio.testing.MockClock) -> None:
    seen: list[dict[str, Any]] = []
    heads: list[bytes] = []
    parts = [(1, event({"choices": [{"text": "a"}]})), (3, event({"choices": [{"text": "b", "finish_reason": "length"}]}))]
    run = Run(TARGET, connect=server(lambda body: streaming(*parts, (3, usage(9, 2) + DONE)), seen, heads))

    await prepare(run, Settings(endpoint="completions", prompt_tokens=9, concurrency=(1,)))
    figures = await measure_round(run, 1, 0, Settings(endpoint="completions", requests=1, output_tokens=2))

    assert {head.split(b"\r\n")[0] for head in heads} == {b"POST /v1/completions HTTP/1.1"}
    assert all(isinstance(body["prompt"], str) and "messages" not in body for body in seen)
    assert run.answer == "ab"
    assert (figures.errors, figures.output_tokens, figures.times["ttft_p50"], figures.times["itl_p50"]) == (0, 2, 1, 2)


async def test_an_open_loop_sends_what_is_due_whatever_is_under_way(autojump_clock: trio.testing.MockClock) -> None:
    """Each answer takes 2 s, and every half second a request is due."""
    settings = Settings(request_rate=(2.0,), arrivals="constant", requests=10, output_tokens=11, goodput=(("ttft", 1.5),))
    run = Run(TARGET, dialect="full length", words=75, connect=server(echo_server))

    figures = await measure_round(run, 2.0, 0, settings)

    assert figures.requests_per_second == pytest.approx(10 / (4.5 + 2))
    assert figures.times["ttft_p99"] == pytest.approx(1)
    assert figures.times["late_p99"] == pytest.approx(0)
    assert figures.goodput == pytest.approx(figures.requests_per_second)


async def test_a_bound_on_requests_under_way_makes_others_late(autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(request_rate=(float("inf"),), max_concurrency=1, requests=3, output_tokens=11)
    run = Run(TARGET, dialect="full length", words=75, connect=server(echo_server))

    figures = await measure_round(run, float("inf"), 0, settings)

    assert figures.times["late_p50"] == pytest.approx(2)  # after 0, 2 and 4 seconds
    assert figures.times["ttft_p99"] == pytest.approx(1)


async def test_rounds_draw_arrivals_of_their_own_which_targets_share(autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(request_rate=(2.0,), requests=5, output_tokens=2)
    due = []
    for number in (0, 0, 1):
        run = Run(TARGET, dialect="full length", words=75, connect=server(echo_server))
        await measure_round(run, 2.0, number, settings)
        times = sorted(sample.due or 0.0 for sample in run.samples[2.0][0])
        due.append([time - times[0] for time in times])

    first, again, other = due
    assert first == pytest.approx(again)
    assert first != pytest.approx(other)


@pytest.mark.parametrize(
    ("load", "requests"), [({"concurrency": (2,)}, 4), ({"request_rate": (2.0,), "arrivals": "constant"}, 6)]
)
async def test_a_round_may_have_a_duration(load: dict[str, Any], requests: int, autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(**load, duration=3.0, output_tokens=11)  # answers take 2 s
    run = Run(TARGET, dialect="full length", words=75, connect=server(echo_server))

    figures = await measure_round(run, settings.levels[0], 0, settings)

    assert (figures.requests, figures.errors) == (requests, 0)  # those under way at its end are answered


async def test_a_server_that_is_gone_is_not_asked_all_the_time(autojump_clock: trio.testing.MockClock) -> None:
    async def connect(url: str) -> trio.abc.Stream:
        raise OSError("refused")

    run = Run(TARGET, dialect="plain", words=75, connect=connect)

    figures = await measure_round(run, 2, 0, Settings(duration=1.0))

    assert figures.errors == figures.requests
    assert 4 <= figures.requests <= 22


async def test_what_was_answered_before_a_round_is_cancelled_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    run = Run(TARGET, dialect="full length", words=75, connect=server(echo_server))

    with trio.move_on_after(5):
        await measure_round(run, 1, 0, Settings(requests=9, output_tokens=11))
    with trio.move_on_after(1):
        await measure_round(run, 1, 1, Settings(requests=9, output_tokens=11))

    (figures,) = run.levels[1]
    assert (figures.requests, figures.errors) == (2, 0)


async def test_warming_up_leaves_no_trace(autojump_clock: trio.testing.MockClock) -> None:
    for warmup, expected in ((0, 0), (3, 3), (None, 2)):
        seen: list[dict[str, Any]] = []
        run = Run(TARGET, connect=server(echo_server, seen))
        settings = Settings(concurrency=(1, 2), warmup=warmup, prompt_tokens=80, output_tokens=11)

        await prepare(run, settings)

        assert sum(body["max_tokens"] == 11 for body in seen) == expected
        assert run.levels == {}


async def test_a_server_that_is_not_there_yet_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    answering = server(lambda body: plain(503) if trio.current_time() - began < 40 else echo_server(body))

    async def connect(url: str) -> trio.abc.Stream:
        if trio.current_time() - began < 20:
            raise OSError("refused")
        return await answering(url)

    await prepare(run := Run(TARGET, connect=connect), Settings(wait=60, warmup=0))

    assert run.dialect == "full length"
    with pytest.raises(BenchError, match="ConnectError: refused"):
        began = trio.current_time()
        await prepare(Run(TARGET, connect=connect), Settings(wait=10, warmup=0))
    assert trio.current_time() - began == pytest.approx(10, abs=0.6)
