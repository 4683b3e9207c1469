"""What a key may use, on a clock that is set, and over HTTP."""

import signal
from pathlib import Path

import httpx
import pytest
import trio

from dashinfer.errors import ConfigurationError, RateLimitExceeded
from dashinfer.serving.auth import KeyRing, read_keys
from dashinfer.serving.limits import Limiter, Limits, duration

from .conftest import RunServer
from .fake_engine import SeeingEngine
from .process import PATIENCE, running, server_command
from .seeing import data_uri, encode, picture, write_model
from .seeing import make_text as make_seeing_text

pytestmark = pytest.mark.feature("Security", "Keys with limits of their own")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_requests_come_back_evenly(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(requests=3)
    left = [limiter.admit(b"a", limits)[1]["x-ratelimit-remaining-requests"] for _ in range(3)]
    with pytest.raises(RateLimitExceeded) as refused:
        limiter.admit(b"a", limits)
    limiter.admit(b"b", limits)
    clock.now += 19
    with pytest.raises(RateLimitExceeded):
        limiter.admit(b"a", limits)
    clock.now += 1
    _, headers = limiter.admit(b"a", limits)
    clock.now += 1000
    _, rested = limiter.admit(b"a", limits)

    assert left == ["2", "1", "0"]
    assert refused.value.retry_after == 20
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    assert headers == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    assert rested["x-ratelimit-remaining-requests"] == "2"


def test_tokens_are_taken_when_they_are_known(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(tokens=600)
    lease, headers = limiter.admit(b"a", limits)
    lease.charge(700)
    with pytest.raises(RateLimitExceeded) as refused:
        limiter.admit(b"a", limits)
    clock.now += refused.value.retry_after
    _, later = limiter.admit(b"a", limits)

    assert headers["x-ratelimit-remaining-tokens"] == "600"
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"
    assert refused.value.headers["x-ratelimit-reset-tokens"] == "1m10s"
    assert refused.value.retry_after == 11
    assert later["x-ratelimit-remaining-tokens"] == "10"


def test_requests_at_a_time(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(concurrent=2)
    first, _ = limiter.admit(b"a", limits)
    limiter.admit(b"a", limits)
    with pytest.raises(RateLimitExceeded):
        limiter.admit(b"a", limits)
    first.release()

    assert limiter.admit(b"a", limits)[1] == {}


def test_new_limits_begin_full(clock: Clock) -> None:
    limiter = Limiter(clock)
    limiter.admit(b"a", Limits(requests=1))
    _, headers = limiter.admit(b"a", Limits(requests=5))
    limiter.keep({b"b"})
    _, forgotten = limiter.admit(b"a", Limits(requests=5))

    assert headers["x-ratelimit-remaining-requests"] == forgotten["x-ratelimit-remaining-requests"] == "4"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.0001, "0.001s"), (1.5, "1.5s"), (60, "1m0s"), (119.9999, "2m0s"), (61.25, "1m1.25s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-1\n\n  sk-2 requests=5 tokens=0  # a guest\nsk#3 concurrent=1\n")
    ring = KeyRing(["sk-0"], open_paths=["/health"], file=file, limits=Limits(requests=60, tokens=1000))

    def limits(key: str) -> Limits:
        return ring.limits_of(ring.check("/v1/models", [(b"authorization", f"Bearer {key}".encode())]))

    assert limits("sk-0") == limits("sk-1") == Limits(60, 1000)
    assert limits("sk-2") == Limits(5, None)
    assert limits("sk#3") == Limits(60, 1000, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "sk-1 sk-2",
        "sk-1 requests=-1",
        "sk-1 requests",
        "sk-1 colour=1",
        "schlüssel",
        "sk-1 tokens=1" + 5000 * "0",
    ],
)
def test_files_that_are_refused_say_nothing_of_keys(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        read_keys(file, Limits())

    assert str(file) in str(refused.value)
    assert "sk-" not in str(refused.value)


async def test_over_http(run_server: RunServer, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1\nsk-2 requests=1\n")
    one, two = ({"authorization": f"Bearer sk-{number}"} for number in (1, 2))
    async with run_server(api_keys_file=tmp_path / "keys", rate_limit_requests=100, rate_limit_tokens=1000) as server:

        async def ask(headers: dict[str, str]) -> httpx.Response:
            return await server.client.post("/v1/chat/completions", json=server.body("say hi"), headers=headers)

        answers = [await ask(headers) for headers in (one, one, two, two, {})]
        models = await server.client.get("/v1/models", headers=two)

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 401]
    assert [answers[number].headers["x-ratelimit-remaining-requests"] for number in range(4)] == ["99", "98", "0", "0"]
    tokens = len("user: say hi") + 1 + len("hi") + 1
    assert int(answers[1].headers["x-ratelimit-remaining-tokens"]) == pytest.approx(1000 - tokens, abs=2)
    assert (answers[3].headers["retry-after"], answers[3].json()["error"]["code"]) == ("60", "rate_limit_exceeded")
    assert (models.status_code, "x-ratelimit-limit-requests" in models.headers) == (200, False)


def test_a_request_holds_a_place_for_each_sequence(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(concurrent=4)
    first, _ = limiter.admit(b"a", limits)
    second, _ = limiter.admit(b"a", limits)
    held = [first.take(2, 2), second.take(1, 100)]
    with pytest.raises(RateLimitExceeded) as full:
        second.take(3, 3)
    with pytest.raises(RateLimitExceeded) as too_many:
        first.take(5, 5)
    with pytest.raises(RateLimitExceeded):
        limiter.admit(b"a", limits)
    moved = second.move()
    second.release()
    first.release()
    third, _ = limiter.admit(b"a", limits)

    assert held == [2, 2]
    assert (full.value.retry_after, full.value.headers) == (1, {})
    assert (too_many.value.retry_after, too_many.value.headers) == (None, {"x-should-retry": "false"})
    assert third.take(2, 100) == 2
    moved.release()
    assert third.take(1, 100) == 4


def test_places_are_taken_in_steps(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(concurrent=8)
    first, _ = limiter.admit(b"a", limits)
    second, _ = limiter.admit(b"a", limits)

    assert (first.take(3, 300), second.take(1, 1), second.take(2, 300)) == (6, 1, 2)


def test_lower_limits_leave_what_is_held(clock: Clock) -> None:
    limiter = Limiter(clock)
    leases = [limiter.admit(b"a", Limits(concurrent=4))[0] for _ in range(3)]
    leases[0].take(2, 2)
    with pytest.raises(RateLimitExceeded):
        limiter.admit(b"a", Limits(concurrent=1))

    assert leases[1].take(1, 100) == 1


@pytest.mark.parametrize(("path", "name"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
async def test_prompts_take_turns_in_the_places_of_a_key(run_server: RunServer, path: str, name: str) -> None:
    answers: list[httpx.Response] = []
    async with run_server(rate_limit_concurrent=2) as server:
        server.engine.gate = trio.Event()

        async def ask() -> None:
            texts = ["say a", "say b", "say c", "say d", "say e"]
            answers.append(await server.client.post(path, json={"model": "demo", name: texts}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            together = await server.engine.submitted_by_then(running=2)
            await ask()
            server.engine.gate.set()

    assert together == 2
    assert [answer.status_code for answer in answers] == [429, 200]
    assert len(server.engine.submitted) == 5


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_choices_are_held_to_the_limit(run_server: RunServer, path: str) -> None:
    async with run_server(rate_limit_concurrent=3) as server:

        async def ask(text: str, n: int) -> httpx.Response:
            body = server.body(text, n=n) if "chat" in path else {"model": "demo", "prompt": text, "n": n, "max_tokens": 9}
            return await server.client.post(path, json=body)

        too_many = await ask("say a", 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "wait ab", 2)
            await server.engine.until_waiting()
            two = await ask("say a", 2)
            one = await ask("say a", 1)
            server.engine.release.set()
        later = await ask("say a", 3)

    assert [answer.status_code for answer in (too_many, two, one, later)] == [429, 429, 200, 200]
    assert (too_many.headers["x-should-retry"], "retry-after" in too_many.headers) == ("false", False)
    assert two.headers["retry-after"] == "1"
    assert {answer.json()["error"]["code"] for answer in (too_many, two)} == {"rate_limit_exceeded"}


async def test_tokens_of_embeddings_count(run_server: RunServer) -> None:
    async with run_server(rate_limit_tokens=1000) as server:
        for _ in range(2):
            answer = await server.client.post("/v1/embeddings", json={"model": "demo", "input": ["a" * 100, "b" * 200]})

    assert int(answer.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(700, abs=2)


async def test_tokens_of_images_count(run_server: RunServer, tmp_path: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": data_uri(encode(picture(60, 90)))}}
    model = make_seeing_text(write_model(tmp_path))
    async with run_server(engine_type=SeeingEngine, model=model, rate_limit_tokens=1000) as server:
        body = {"model": "demo", "messages": [{"role": "user", "content": [part, {"type": "text", "text": "say hi"}]}]}
        answers = [await server.client.post("/v1/chat/completions", json=body) for _ in range(2)]

    usage = answers[0].json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] > 1
    assert int(answers[1].headers["x-ratelimit-remaining-tokens"]) == pytest.approx(1000 - usage["total_tokens"], abs=2)


async def test_one_at_a_time_over_http(run_server: RunServer) -> None:
    async with run_server(rate_limit_concurrent=1) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.chat, "wait ab")
            await server.engine.until_waiting()
            refused = await server.chat("say no")
            server.engine.release.set()
        answer = await server.chat("say hi")

    assert (refused.status_code, answer.status_code) == (429, 200)
    assert "x-ratelimit-limit-requests" not in answer.headers


def test_keys_are_read_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-1")
    with running(server_command(tmp_path, "--api-keys-file", str(keys))) as server:
        server.wait_ready()

        def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.get(f"{server.url}/v1/models", headers=headers, timeout=PATIENCE).status_code

        before = status("sk-1"), status("sk-2")
        keys.write_text("sk-2\nsk-3")
        server.signal(signal.SIGHUP)
        server.wait_for("2 API keys")
        after = status("sk-1"), status("sk-2")
        keys.write_text("")
        server.signal(signal.SIGHUP)
        server.wait_for("the keys stay as they are: .* has no key")
        at_last = status("sk-1"), status("sk-2")

    assert before == (200, 401)
    assert after == at_last == (401, 200)


def test_a_file_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("")
    with running(server_command(tmp_path, "--api-keys-file", str(keys))) as server:
        status = server.end()

    assert status == 2
    assert server.said[-1] == f"dashinfer_serve: error: --api-keys-file {keys} has no key"
