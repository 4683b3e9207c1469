"""Chat completions: streams, choices, stop strings, log-probabilities, failures and disconnects."""

import json
import socket
import struct

import httpx
import pytest
import trio

from dashinfer.errors import InternalError
from dashinfer.protocol.chat import ChatCompletion, ChatCompletionChunk
from dashinfer.serving import edge

from .conftest import Running, RunServer


def events_of(text: str) -> list[str]:
    parts = text.split("\n\n")
    assert parts.pop() == "", "a stream ends with a whole event"
    assert all(part.startswith("data: ") for part in parts)
    return [part.removeprefix("data: ") for part in parts]


def chunks_of(text: str) -> list[ChatCompletionChunk]:
    *chunks, done = events_of(text)
    assert done == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(chunk) for chunk in chunks]


@pytest.mark.feature("Endpoints", "Chat completions, whole or streamed")
async def test_stream(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.chat("say Grüße 👋🏽!", stream=True, stream_options={"include_usage": True})

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, *middle, finish, usage = chunks_of(answer.text)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content for chunk in middle]
    assert "".join(pieces) == "Grüße 👋🏽!"
    assert "\ufffd" not in "".join(pieces)
    assert finish.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == len("Grüße 👋🏽!".encode()) + 1
    assert len({chunk.id for chunk in (first, *middle, finish, usage)}) == 1


async def test_what_is_ready_together_goes_out_together(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.at_once = 100
        answer = await server.chat("say abcdef", stream=True)

    assert [chunk.choices[0].delta.content for chunk in chunks_of(answer.text)] == ["", "abcdef", None]


@pytest.mark.feature("Sampling", "Choices, seeds, stops, lengths")
@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string(run_server: RunServer, at_once: int, stream: bool) -> None:
    async with run_server() as server:
        server.engine.at_once = at_once
        fields = {"stop": ["END", "never"], "stream": stream, "n": 2}
        fields |= {"stream_options": {"include_usage": True}} if stream else {}
        answer = await server.chat("say one EN two END three", **fields)

    if stream:
        *chunks, last = chunks_of(answer.text)
        usage = last.usage
        shown = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == 1]
        assert "".join(shown) == "one EN two "
        assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop", "stop"]
    else:
        completion = ChatCompletion.model_validate_json(answer.content)
        usage = completion.usage
        assert [choice.message.content for choice in completion.choices] == ["one EN two "] * 2
    # However many tokens came at once, those after the stop string are not counted.
    assert usage.completion_tokens == 2 * len("one EN two END")
    assert sorted(line for line in server.engine.record if line.startswith("stop")) == ["stop 0", "stop 1"]


@pytest.mark.feature("Sampling", "Choices, seeds, stops, lengths")
@pytest.mark.parametrize("stream", [False, True])
async def test_length(run_server: RunServer, stream: bool) -> None:
    async with run_server() as server:
        answer = await server.chat("forever", max_tokens=5, stream=stream, stop=["xxxxxxx"])

    if stream:
        chunks = chunks_of(answer.text)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "xxxxx"
        assert chunks[-1].choices[0].finish_reason == "length"
    else:
        choice = answer.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("xxxxx", "length")
        assert answer.json()["usage"]["completion_tokens"] == 5


@pytest.mark.feature("Sampling", "Log-probabilities")
@pytest.mark.parametrize("at_once", [1, 100])
async def test_logprobs(run_server: RunServer, at_once: int) -> None:
    async with run_server() as server:
        server.engine.at_once = at_once
        whole = await server.chat("say ü!", logprobs=True, top_logprobs=2)
        answer = await server.chat("say ü!", logprobs=True, top_logprobs=2, stream=True)

    expected = [[0xC3], [0xBC], [ord("!")]]  # not the end of the turn
    entries = ChatCompletion.model_validate_json(whole.content).choices[0].logprobs.content
    assert [entry.bytes for entry in entries] == expected
    assert [top.token for top in entries[0].top_logprobs] == ["A", "B"]
    streamed = [entry for c in chunks_of(answer.text) if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert streamed == entries


async def test_quiet_stream_is_kept_alive(run_server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "KEEP_ALIVE", 0.01)
    async with (
        run_server() as server,
        server.client.stream("POST", "/v1/chat/completions", json=server.body("wait ab", stream=True)) as answer,
    ):
        seen = ""
        with trio.fail_after(10):
            async for piece in answer.aiter_text():
                seen += piece
                if ": keep-alive\n\n" in seen:
                    server.engine.release.set()

    assert '"content":"a"' in seen
    assert '"content":"b"' in seen
    assert seen.endswith("data: [DONE]\n\n")


async def test_engine_failure(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.lost = InternalError("the engine lost this request")
        whole = await server.chat("say no")
        streamed = await server.chat("say no", stream=True)

    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "internal_error"
    assert streamed.status_code == 200  # it had begun
    role, error = events_of(streamed.text)
    assert json.loads(role)["choices"][0]["delta"]["role"] == "assistant"
    assert json.loads(error)["error"]["message"] == "the engine lost this request"


async def leave(server: Running, *, stream: bool) -> None:
    """Send a request that never ends, and go once the engine has it."""
    async with trio.open_nursery() as nursery:

        async def request() -> None:
            async with httpx.AsyncClient(base_url=server.url) as client:
                await client.post("/v1/chat/completions", json=server.body("wait ab", stream=stream))

        nursery.start_soon(request)
        await server.engine.until_waiting()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_ends_the_generation(run_server: RunServer, stream: bool) -> None:
    async with run_server() as server:
        for _ in range(5):
            await leave(server, stream=stream)
            await server.engine.until(lambda: server.engine.running == 0)
        with trio.fail_after(10):
            await server.service.idle()

    assert server.engine.record[:10] == ["begin", "end"] * 5


@pytest.mark.parametrize("reset", [False, True])
async def test_disconnect_from_a_stream_in_full_flow(run_server: RunServer, reset: bool) -> None:
    async with run_server() as server:
        body = json.dumps(server.body("forever", stream=True, max_tokens=4000)).encode()
        for _ in range(5):
            with trio.socket.from_stdlib_socket(server.connect()) as client:
                if reset:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await client.send(
                    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
                )
                assert (await client.recv(100)).startswith(b"HTTP/1.1 200")
            await server.engine.until(lambda: server.engine.running == 0)

    assert server.engine.record[:10] == ["begin", "end"] * 5


async def test_many_at_once(run_server: RunServer) -> None:
    texts = [f"answer number {i}" for i in range(50)]
    answers: dict[str, str] = {}

    async with run_server() as server:

        async def ask(text: str) -> None:
            answer = await server.chat(f"say {text}", stream=True)
            answers[text] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks_of(answer.text))

        async with trio.open_nursery() as nursery:
            for text in texts:
                nursery.start_soon(ask, text)

    assert answers == {text: text for text in texts}
