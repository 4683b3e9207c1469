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
from .process import PATIENCE, running, server_command

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
    quota, headers = limiter.admit(b"a", limits)
    limiter.charge(quota, 700)
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
    limiter.release(first)

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
    "text", ["", "# nothing\n", "sk-1 sk-2", "sk-1 requests=-1", "sk-1 requests", "sk-1 colour=1", "schlüssel"]
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
            answer = await server.client.post("/v1/chat/completions", json=server.body("say hi"), headers=headers)
            await server.service.idle()
            return answer

        answers = [await ask(headers) for headers in (one, one, two, two, {})]
        models = await server.client.get("/v1/models", headers=two)

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 401]
    assert [answers[number].headers["x-ratelimit-remaining-requests"] for number in range(4)] == ["99", "98", "0", "0"]
    tokens = len("user: say hi") + 1 + len("hi") + 1
    assert int(answers[1].headers["x-ratelimit-remaining-tokens"]) == pytest.approx(1000 - tokens, abs=2)
    assert (answers[3].headers["retry-after"], answers[3].json()["error"]["code"]) == ("60", "rate_limit_exceeded")
    assert (models.status_code, "x-ratelimit-limit-requests" in models.headers) == (200, False)


async def test_one_at_a_time_over_http(run_server: RunServer) -> None:
    async with run_server(rate_limit_concurrent=1) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.chat, "wait ab")
            await server.engine.until_waiting()
            refused = await server.chat("say no")
            server.engine.release.set()
        await server.service.idle()
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
