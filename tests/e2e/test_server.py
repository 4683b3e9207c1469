"""A real server process on the demo model, used as the documentation prints it."""

import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import openai
import pytest

from tests.process_tree import any_left

from .conftest import ServerProcess

NAME = "Qwen2.5-7B-Instruct"
QUESTION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture
def client(server: ServerProcess):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def rss_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.feature("Endpoints", "Chat completions, whole or streamed")
def test_the_documented_curl_call(server):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl on this machine")
    body = {"model": NAME, "messages": QUESTION, "temperature": 0, "max_tokens": 256}
    answer = subprocess.run(
        [curl, "-sS", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", json.dumps(body)],
        check=True,
        capture_output=True,
    ).stdout
    completion = json.loads(answer)

    assert "Paris" in completion["choices"][0]["message"]["content"]
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["object"] == "chat.completion"


@pytest.mark.feature("Endpoints", "Chat completions, whole or streamed")
@pytest.mark.feature("Clients", "OpenAI's for Python")
def test_the_python_client(client):
    response = client.chat.completions.create(model=NAME, messages=QUESTION, temperature=0, max_tokens=512)

    assert "Paris" in response.choices[0].message.content
    assert response.choices[0].finish_reason == "stop"
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


@pytest.mark.feature("Endpoints", "Chat completions, whole or streamed")
@pytest.mark.feature("Clients", "OpenAI's for Python")
def test_the_python_client_streaming(client):
    stream = client.chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert "Paris" in text
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.feature("Sampling", "Choices, seeds, stops, lengths")
def test_a_seed_repeats_an_answer_and_another_changes_it(client):
    def ask(seed: int) -> str:
        response = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "Tell me a story."}], temperature=1.0, seed=seed, max_tokens=24
        )
        return response.choices[0].message.content

    ask(0)  # from here on the prompt's first blocks come from the cache, which rounds a little differently than computing them

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


@pytest.mark.feature("Parallelism and recovery", "Continuous batching, prefix cache, preemption")
def test_the_second_turn_reuses_the_first(client):
    messages = [{"role": "user", "content": "Count slowly from one to forty, please, with every number in words. " * 4}]
    first = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0)
    again = client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, temperature=0)

    assert again.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens // 2
    assert again.choices[0].message.content == first.choices[0].message.content


@pytest.mark.feature("Sampling", "Choices, seeds, stops, lengths")
def test_stop_strings_length_and_choices(client):
    messages = [{"role": "user", "content": "Count from one to ten in digits, separated by commas: 1, 2, 3,"}]
    cut = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=60, stop=["5"])
    short = client.chat.completions.create(
        model=NAME, messages=messages, temperature=1, max_tokens=3, n=3, extra_body={"ignore_eos": True}
    )

    assert "5" not in cut.choices[0].message.content
    assert cut.choices[0].finish_reason == "stop"
    assert [choice.finish_reason for choice in short.choices] == ["length"] * 3
    assert short.usage.completion_tokens == 9


@pytest.mark.feature("Sampling", "Log-probabilities")
def test_logprobs_rank_the_greedy_token_first(client):
    response = client.chat.completions.create(
        model=NAME, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = response.choices[0].logprobs.content

    assert len(content) == 5
    for entry in content:
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-4)
        assert len(entry.top_logprobs) == 3
    assert "".join(entry.token for entry in content) == response.choices[0].message.content


def test_the_parent_is_light(server):
    """It never loads torch, and stays under 150 MB."""
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()

    assert "libtorch" not in maps
    assert rss_megabytes(server.process.pid) < 150
    assert len(server.worker_pids) == 1
    assert "libtorch" in Path(f"/proc/{server.worker_pids[0]}/maps").read_text()


def test_the_worker_holds_weights_cache_and_little_else(server):
    weights, cache = 270, 512  # MB: 134.5M parameters of 16 bits, and --kv-cache-memory

    assert rss_megabytes(server.worker_pids[0]) < weights + cache + 700


@pytest.mark.feature("Endpoints", "Chat completions, whole or streamed")
@pytest.mark.feature("Parallelism and recovery", "Continuous batching, prefix cache, preemption")
def test_mixed_load_is_answered_completely(server):
    """Sixteen streams and short calls at once, of different lengths; each gets exactly what it asked for."""
    results: dict[int, tuple[int, str]] = {}

    def ask(number: int) -> None:
        body = {
            "model": NAME,
            "messages": [{"role": "user", "content": f"Question {number}: tell me about the number {number}."}],
            "max_tokens": 5 + number,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        results[number] = json.loads(events[-2])["usage"]["completion_tokens"], events[-1]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert results == {number: (5 + number, "[DONE]") for number in range(16)}


LONG_STREAM = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "max_tokens": 120,
    "ignore_eos": True,
    "stream": True,
}


@pytest.mark.feature("Operations", "Requests finish before an end")
def test_sigterm_lets_a_stream_finish():
    server = ServerProcess.start("--model", "demo", "--kv-cache-memory", "256MiB")
    worker = server.worker_pids[0]
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG_STREAM, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.process.pid, signal.SIGTERM)
        rest = list(lines)

    assert rest[-2:] == ["data: [DONE]", ""] or rest[-1] == "data: [DONE]"
    assert server.stop() == 0
    assert not Path(f"/proc/{worker}").exists()


def test_a_killed_server_leaves_no_worker():
    server = ServerProcess.start("--model", "demo", "--kv-cache-memory", "256MiB")
    worker = server.worker_pids[0]
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG_STREAM, timeout=60) as response:
        next(response.iter_lines())  # it is in the middle of its work
        server.process.kill()
        server.process.wait()
    assert any_left([worker]) == []
    server.stop()


def test_a_killed_worker_that_is_not_replaced_is_told_to_the_client_and_ends_the_server():
    server = ServerProcess.start("--model", "demo", "--kv-cache-memory", "256MiB", "--max-restarts", "0")
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=LONG_STREAM, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.worker_pids[0], signal.SIGKILL)
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]

    assert events[-1]["error"]["type"] == "server_error"
    assert server.process.wait(20) == 1
    assert any("rank 0 was killed by SIGKILL" in line for line in server.lines)
    server.stop()
