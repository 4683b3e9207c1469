"""Anthropic's Messages API. The model's output is what the prompt tells it to say."""

import json
from collections.abc import AsyncIterator
from datetime import date
from typing import Any

import anthropic
import httpx
import pytest
import trio
from pydantic import BaseModel, Field, TypeAdapter

from dashinfer.errors import InternalError, InvalidRequest
from dashinfer.guidance.spec import Constraint
from dashinfer.protocol.anthropic import AnthropicError, MessagesRequest, MessagesResponse, TokenCount
from dashinfer.protocol.parse import parse_request
from dashinfer.serving import app, service
from dashinfer.serving.service import TextModel
from dashinfer.text.tools.formats import ToolFormat

from .conftest import Running, RunServer
from .test_tools import CALL, WEATHER, make_model

pytestmark = pytest.mark.feature("Endpoints", "Anthropic's Messages")

TOOL = {
    "name": "weather",
    "description": WEATHER["function"]["description"],
    "input_schema": WEATHER["function"]["parameters"],
}

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "schema": PERSON}


THEIR_EVENT = TypeAdapter(anthropic.types.RawMessageStreamEvent)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return make_model(tmp_path_factory.mktemp("model"), ToolFormat("hermes"))


async def ask(server: Running, content: Any = "say hi", **fields: Any) -> httpx.Response:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    body = {"model": "demo", "max_tokens": 100, "messages": messages, **fields}
    return await server.client.post("/v1/messages", json=body)


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
        if found[-1]["type"] not in ("ping", "error"):  # which have no type of theirs
            THEIR_EVENT.validate_python(found[-1])
    return found


async def test_text(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await ask(server, "say hello", system="be kind")

    found = MessagesResponse.model_validate_json(answer.content, strict=True)
    anthropic.types.Message.model_validate_json(answer.content, strict=True)
    assert found.content == [{"type": "text", "text": "hello"}]
    assert (found.stop_reason, found.stop_sequence) == ("end_turn", None)
    prompt = len("system: be kinduser: say hello") + 1
    assert (found.usage.input_tokens, found.usage.cache_read_input_tokens) == (prompt % 16, prompt // 16 * 16)
    assert found.usage.output_tokens == len("hello") + 1
    assert found.id.startswith("msg_")


@pytest.mark.parametrize(
    ("fields", "reason", "sequence", "said"),
    [({"max_tokens": 2}, "max_tokens", None, "he"), ({"stop_sequences": ["x", "l"]}, "stop_sequence", "l", "he")],
)
async def test_why_it_ends(run_server: RunServer, fields: dict[str, Any], reason: str, sequence: str | None, said: str) -> None:
    async with run_server() as server:
        answers = [await ask(server, "say hello", **fields, stream=stream) for stream in (False, True)]

    whole = answers[0].json()
    *_, delta, _ = events_of(answers[1])
    assert (whole["stop_reason"], whole["stop_sequence"], whole["content"][0]["text"]) == (reason, sequence, said)
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    assert delta["usage"] == whole["usage"]


@pytest.mark.parametrize("at_once", [1, 1000])
async def test_thinking_text_and_calls(run_server: RunServer, model: TextModel, at_once: int) -> None:
    said = f"say <think>hm</think>Look! {CALL}"
    async with run_server(model=model) as server:
        server.engine.at_once = at_once
        whole = (await ask(server, said, tools=[TOOL], max_tokens=200)).json()
        events = events_of(await ask(server, said, tools=[TOOL], max_tokens=200, stream=True))

    thinking, text, call = whole["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "hm")
    assert text == {"type": "text", "text": "Look!"}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Paris"})
    assert whole["stop_reason"] == "tool_use"
    assert events[0]["message"]["content"] == []
    blocks: list[dict[str, Any]] = []
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append({**event["content_block"], "text_of_all": ""})
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1
                delta = event["delta"]
                blocks[-1]["text_of_all"] += delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""
            case kind:
                assert (kind, event["index"]) == ("content_block_stop", len(blocks) - 1)
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert [blocks[0]["text_of_all"], blocks[1]["text_of_all"]] == ["hm", text["text"]]
    assert json.loads(blocks[2]["text_of_all"]) == {"city": "Paris"}
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]


async def test_a_history_becomes_a_chat(run_server: RunServer, model: TextModel) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Mild."}]},
                {"type": "text", "text": "say so"},
            ],
        },
    ]
    async with run_server(model=model) as server:
        answer = await ask(server, messages, tools=[TOOL], thinking={"type": "disabled"})
        (prompt, *_), *_ = server.engine.submitted

    assert answer.status_code == 200, answer.text
    shown = model.tokenizer.decode(prompt, skip_special_tokens=False)
    assert shown.endswith(
        "user: Weather?\nassistant: Wait.(hm)[weather Paris]\ntool weather: Mild.\nuser: say so<|end|><think></think>(none)"
    )


async def test_an_answer_that_is_begun_goes_on(run_server: RunServer) -> None:
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "say so"}]
    async with run_server() as server:
        await ask(server, messages)
        (prompt, *_), *_ = server.engine.submitted

    assert bytes(prompt) == b"user: Hm?assistant: say so"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "`max_tokens`"),
        ({"messages": []}, "`messages`"),
        ({"messages": [{"role": "system", "content": "a"}]}, "`messages.0.role`"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "`messages.0.content.0`"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "`messages.0.content.0`"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "`messages.0.content.0.tool_use_id`"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "`messages.0.content.0.source`"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [5]}]}]},
            "`messages.0.content.0.0`",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "`messages.0.content`"),
        ({"system": [{"type": "image"}]}, "`system.0`"),
        ({"tool_choice": {"type": "some"}}, "`tool_choice`"),
        ({"thinking": {"type": "maybe"}}, "`thinking.type`"),
        ({"temperature": 1.5}, "`temperature`"),
        ({"nonsense": 1}, "`nonsense`"),
        ({"output_config": {"format": {"type": "json_object"}}}, "`output_config.format.type`"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "`output_config.format.schema`"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "`output_config.format.schema`"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "`output_config.format.schema`"),
        ({"output_config": {"effort": "least"}}, "`output_config.effort`"),
        ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, "`output_format`"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused(run_server: RunServer, fields: dict[str, Any], words: str, stream: bool) -> None:
    async with run_server() as server:
        answer = await ask(server, **{"stream": stream, **fields})

    assert answer.status_code == 400
    error = AnthropicError.model_validate_json(answer.content).error
    assert error.type == "invalid_request_error"
    assert words in error.message


async def test_failures(run_server: RunServer) -> None:
    async with run_server() as server:
        other = await ask(server, model="other")
        server.engine.lost = InternalError("the engine lost this request")
        whole, streamed = await ask(server), await ask(server, stream=True)

    assert (other.status_code, other.json()["error"]["type"]) == (404, "not_found_error")
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "api_error")
    assert events_of(streamed)[-1]["error"]["message"] == "the engine lost this request"


PATHS = ("/v1/messages", "/v1/messages/count_tokens")
KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 500: "api_error", 503: "overloaded_error",
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("status", [400, 401, 404, 405, 408, 413, 429, 500, 503])
async def test_every_refusal_has_the_shape(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch, path: str, status: int
) -> None:
    """Whoever refuses: the edge, the framework, the route, or nobody on purpose."""
    monkeypatch.setattr(app, "BODY_TIMEOUT", 0.05 if status == 408 else 10)

    def broken(*given: Any) -> None:
        raise AssertionError("a bug")

    if status == 500:
        monkeypatch.setattr(service.Service, "check_model", broken)

    async def stalled() -> AsyncIterator[bytes]:
        yield b"{"
        await trio.sleep(0.5)
        yield b"}"

    fields = {} if path.endswith("count_tokens") else {"max_tokens": 9}
    good = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "say hi"}], **fields})
    content: Any = {400: "{}", 408: stalled(), 413: " " * (2**23 + 1)}.get(status, good)
    headers = {"x-api-key": "sk-2" if status == 401 else "sk-1", "x-request-id": "mine-1"}
    async with run_server(api_keys=("sk-1",), rate_limit_requests=1, root_path="/api") as server:
        if status == 503:
            server.engine.state = "draining"
        if status == 429:
            await server.client.post(path, content="{}", headers=headers)
        method = "GET" if status == 405 else "POST"
        target = f"{path}/nothing" if status == 404 else path
        answer = await server.client.request(method, target, content=content, headers=headers)

    assert answer.status_code == status
    found = AnthropicError.model_validate_json(answer.content, strict=True)
    assert found.error.type == KINDS[status]
    assert found.request_id == answer.headers["request-id"] == answer.headers["x-request-id"] == "mine-1"


async def test_other_paths_keep_openais_shape(run_server: RunServer) -> None:
    async with run_server(api_keys=("sk-1",)) as server:
        for path in ("/v1/messagesx", "/v1/chat/completions", "/v1//messages", "/v1"):
            answer = await server.client.post(path)
            assert "code" in answer.json()["error"], path
            assert "request-id" not in answer.headers


async def test_counting(run_server: RunServer) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hello"}],
        "system": [{"type": "text", "text": "be kind"}],
    }
    async with run_server() as server:
        answer = await server.client.post("/v1/messages/count_tokens", json=body)

    assert TokenCount.model_validate_json(answer.content).input_tokens == len("system: be kinduser: hello") + 1


@pytest.mark.feature("Clients", "Anthropic's for Python")
async def test_the_anthropic_client(run_server: RunServer, model: TextModel) -> None:
    async with run_server(model=model, api_keys=("sk-1",)) as server:

        def use() -> tuple[Any, Any, int]:
            with anthropic.Anthropic(base_url=server.url, api_key="sk-1", max_retries=0, timeout=10) as client:
                messages = [{"role": "user", "content": f"say <think>hm</think>{CALL}"}]
                asked = {"model": "demo", "max_tokens": 200, "messages": messages, "tools": [TOOL]}
                whole = client.messages.create(**asked)
                with client.messages.stream(**asked) as stream:
                    streamed = stream.get_final_message()
                with (
                    anthropic.Anthropic(base_url=server.url, api_key="sk-2", max_retries=0) as bad,
                    pytest.raises(anthropic.AuthenticationError) as unknown,
                ):
                    bad.messages.create(**asked)
                assert (unknown.value.type, bool(unknown.value.request_id)) == ("authentication_error", True)
                with pytest.raises(anthropic.BadRequestError) as refused:
                    client.messages.create(**{**asked, "max_tokens": 0})
                assert (refused.value.type, bool(refused.value.request_id)) == ("invalid_request_error", True)
                return whole, streamed, client.messages.count_tokens(model="demo", messages=messages).input_tokens

        whole, streamed, tokens = await trio.to_thread.run_sync(use)

    for message in (whole, streamed):
        assert [block.type for block in message.content] == ["thinking", "tool_use"]
        assert message.content[1].input == {"city": "Paris"}
        assert message.stop_reason == "tool_use"
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert tokens > 10


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.parametrize("fields", [{"output_config": {"format": FORMAT}}, {"output_format": FORMAT}])
async def test_a_format_is_a_grammar(run_server: RunServer, fields: dict[str, Any]) -> None:
    async with run_server() as server:
        plain, answer = await ask(server), await ask(server, **fields)
        none, grammar = server.engine.grammars
        count = await server.client.post(
            "/v1/messages/count_tokens", json={"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
        )

    assert (plain.status_code, answer.status_code, count.status_code) == (200, 200, 200)
    assert (none, grammar is None) == (None, False)
    body = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    constraint = parse_request(MessagesRequest, json.dumps(body).encode()).chat().constraint()
    assert constraint == Constraint.from_schema(PERSON, "response_format.json_schema.schema")


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"output_config": {"effort": "low"}}, "low"),
        ({"output_config": {"effort": "max"}}, "max"),
        ({"output_config": {"effort": "max"}, "thinking": {"type": "disabled"}}, "none"),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}, "low"),
        ({"output_config": {}}, None),
    ],
)
def test_effort(fields: dict[str, Any], effort: str | None) -> None:
    body = {"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}

    assert parse_request(MessagesRequest, json.dumps(body).encode()).chat().reasoning_effort == effort


@pytest.mark.feature("Clients", "Anthropic's for Python")
@pytest.mark.feature("Structured output", "JSON, JSON Schema")
async def test_the_anthropic_client_parses(run_server: RunServer) -> None:
    class Person(BaseModel):
        name: str = Field(min_length=1)
        born: date | None = None

    async with run_server() as server:

        def use() -> tuple[Any, Any, Any]:
            with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0, timeout=10) as client:
                said = 'say {"name":"Ada"}'
                asked = {"model": "demo", "max_tokens": 99, "messages": [{"role": "user", "content": said}]}
                whole = client.messages.parse(**asked, output_format=Person)
                beta = client.beta.messages.parse(**asked, output_format=Person)
                with client.messages.stream(**asked, output_format=Person) as stream:
                    return whole, beta, stream.get_final_message()

        answers = await trio.to_thread.run_sync(use)
        grammars = server.engine.grammars

    assert [answer.parsed_output for answer in answers] == [Person(name="Ada")] * 3
    assert None not in grammars


def test_input_that_is_nested_too_deeply_is_the_requests_fault() -> None:
    """However little of the stack is left where it becomes a call's arguments."""
    refusals = []
    for depth in range(900, 1000):
        block = b'{"type":"tool_use","id":"1","name":"f","input":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        body = b'{"model":"m","max_tokens":1,"messages":[{"role":"assistant","content":[' + block + b"]}]}"
        try:
            parse_request(MessagesRequest, body).chat()
        except InvalidRequest as error:
            refusals.append(str(error))

    assert set(refusals) == {"the body is nested too deeply"}
