"""Everything that is sent is held to our models and to the OpenAI client's."""

import json
from typing import Any

import openai.types.chat
import pytest

from dashinfer import errors
from dashinfer.protocol import chat, stream
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Reasoning
from dashinfer.types import TokenLogprobs

HEAD: dict[str, Any] = {"id": 'chatcmpl-"1"', "created": 1700000000, "model": "mödel", "system_fingerprint": "fp_1"}
TEXTS = ["", "hi", 'quote " and \\ back', "\n\r\t\x00\x7f", "é你🙂", "\u2028\u2029\x85", "</script>", "data: x\n\n"]


def entry(token: int = 1) -> dict[str, Any]:
    names = {1: (" a", [32, 97]), 2: ("\ufffd", [0xF0]), 3: ("\u2028", [226, 128, 168])}
    return stream.logprob_entry(token, TokenLogprobs(-0.5, (1, 2, 3), (-0.5, -1.0, float("-inf"))), names.__getitem__)


def event(raw: bytes) -> dict[str, Any]:
    """The one event in `raw`, which reads as one whatever a client takes for a line end."""
    text = raw.decode()

    assert text.startswith("data: ")
    assert text.endswith("\n\n")
    assert len(text.splitlines()) == 2
    value = json.loads(text.removeprefix("data: "))
    chat.ChatCompletionChunk.model_validate(value, strict=True)
    openai.types.chat.ChatCompletionChunk.model_validate(value, strict=True)
    return value


@pytest.fixture(params=[True, False])
def include_usage(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def encoder(include_usage: bool) -> stream.ChunkEncoder:
    return stream.ChunkEncoder(**HEAD, include_usage=include_usage)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("index", [0, 15])
def test_content(encoder: stream.ChunkEncoder, include_usage: bool, index: int, text: str) -> None:
    expected = {
        **HEAD,
        "object": "chat.completion.chunk",
        "choices": [{"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}],
        **({"usage": None} if include_usage else {}),
    }

    assert event(encoder.content(index, text)) == expected
    assert event(encoder.content(index, text)) == expected


def test_role(encoder: stream.ChunkEncoder) -> None:
    (choice,) = event(encoder.role(3))["choices"]

    assert choice == {"index": 3, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_finish(encoder: stream.ChunkEncoder, include_usage: bool, reason: Any) -> None:
    chunk = event(encoder.finish(0, reason))

    assert chunk["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": reason}]
    assert ("usage" in chunk) == include_usage


def test_logprobs(encoder: stream.ChunkEncoder) -> None:
    for raw in (encoder.content(0, "a", [entry(1), entry(3)]), encoder.finish(0, "stop", [entry(1), entry(3)])):
        (choice,) = event(raw)["choices"]
        first, last = choice["logprobs"]["content"]

        assert (first["token"], first["logprob"], first["bytes"]) == (" a", -0.5, [32, 97])
        assert last["token"] == "\u2028"
        assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.0, -9999.0]


def test_events(encoder: stream.ChunkEncoder) -> None:
    text = '\u2028"é'
    deltas = [
        event(encoder.event(1, each, call_id="call_1"))["choices"][0]["delta"]
        for each in (Content(text), Reasoning(text), CallBegin(2, text), Arguments(2, text))
    ]

    assert deltas == [
        {"content": text},
        {"reasoning_content": text, "reasoning": text},
        {"tool_calls": [{"index": 2, "id": "call_1", "type": "function", "function": {"name": text, "arguments": ""}}]},
        {"tool_calls": [{"index": 2, "function": {"arguments": text}}]},
    ]


def test_a_message_with_calls() -> None:
    calls = [stream.tool_call("call_1", "f", '{"a": 1}')]
    choices = [
        stream.choice(0, "", "tool_calls", tool_calls=calls),
        stream.choice(1, "Yes.", "stop", reasoning="Hm."),
    ]
    value = json.loads(stream.completion_body(**HEAD, choices=choices, usage=stream.usage(1, 2, 0, None, 1)))
    ours = chat.ChatCompletion.model_validate(value, strict=True)
    theirs = openai.types.chat.ChatCompletion.model_validate(value, strict=True)

    assert ours.choices[0].message.content is None
    assert theirs.choices[0].message.tool_calls[0].function.arguments == '{"a": 1}'
    assert (ours.choices[1].message.reasoning_content, ours.choices[1].message.reasoning) == ("Hm.", "Hm.")
    assert "tool_calls" not in value["choices"][1]["message"]
    assert theirs.usage.completion_tokens_details.reasoning_tokens == 1


def test_usage(encoder: stream.ChunkEncoder) -> None:
    chunk = event(encoder.usage(stream.usage(10, 5, 8)))

    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 8},
    }  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("logprobs", [None, [], [entry()]])
def test_completion(text: str, logprobs: list[dict[str, Any]] | None) -> None:
    choices = [stream.choice(0, text, "stop", logprobs), stream.choice(1, "b", "length")]
    value = json.loads(stream.completion_body(**HEAD, choices=choices, usage=stream.usage(1, 2, 0)))
    ours = chat.ChatCompletion.model_validate(value, strict=True)
    theirs = openai.types.chat.ChatCompletion.model_validate(value, strict=True)

    assert ours.choices[0].message.content == theirs.choices[0].message.content == text
    assert value.keys() == chat.ChatCompletion.model_fields.keys()


def test_model_list() -> None:
    value = json.loads(stream.model_list_body(model="m", created=1, max_length=8192))

    assert chat.ModelList.model_validate(value, strict=True).data[0].id == "m"
    assert openai.types.Model.model_validate(value["data"][0], strict=True).created == 1


def test_health() -> None:
    assert json.loads(stream.health_body("ok", "llm")) == {"status": "ok", "mode": "llm"}
    assert chat.Health.model_validate(json.loads(stream.health_body("loading", None)), strict=True).mode is None


def test_errors() -> None:
    error = errors.InvalidRequest("bad \u2028 value", param="messages.0")
    expected = {"error": {"message": "bad \u2028 value", "type": "invalid_request_error", "param": "messages.0", "code": None}}
    raw = stream.error_event(error).decode()

    assert json.loads(stream.error_body(error)) == expected
    assert json.loads(raw.removeprefix("data: ")) == expected
    assert len(raw.splitlines()) == 2
    assert chat.ErrorResponse.model_validate(expected, strict=True).error.param == "messages.0"
