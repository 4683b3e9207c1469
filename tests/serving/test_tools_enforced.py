"""Calls that are required, and calls of strict tools, through the routes and the real engine: workers that draw at random what
the masks allow can say nothing that does not validate."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine
from dashinfer.protocol.chat import ChatCompletion
from dashinfer.serving.service import TextModel
from dashinfer.text.tools.formats import ToolFormat
from dashinfer.types import ModelFiles
from tests.guidance.random_workers import RandomWorkers

from .conftest import Running, RunServer
from .test_tools import joined, make_model

pytestmark = pytest.mark.feature("Tools", "Calls that validate")

FILES = ModelFiles("random", "safetensors", (), {})
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Rome"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "places": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["city", "days"],
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
FORMATS = [
    ToolFormat("hermes"), ToolFormat("llama3_json"), ToolFormat("mistral", "array"), ToolFormat("pythonic"),
    ToolFormat("qwen3_coder"),
]  # fmt: skip


class CallingWorkers(RandomWorkers):
    """Like to begin calls too."""

    def __init__(self, model: TextModel, seed: int) -> None:
        super().__init__(model.tokenizer, seed)
        self._closers |= {
            token for token in map(model.tokenizer.marker_id, ("<tool_call>", "[TOOL_CALLS]")) if token is not None
        }


def served(model: TextModel, seed: int) -> dict[str, Any]:
    """Arguments for `run_server`."""
    workers = CallingWorkers(model, seed)
    config = ServerConfig(model="random", max_batch=8)
    return {"model": model, "engine_type": lambda: Engine(config, FILES, make_workers=lambda _: workers)}


def check(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


async def ask(server: Running, **fields: Any) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Finish, content and calls of a few choices, half of them streamed."""
    whole = await server.chat("go", seed=1, n=6, max_tokens=600, **fields)
    assert whole.status_code == 200, whole.text
    found = []
    for choice in ChatCompletion.model_validate_json(whole.content).choices:
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        found.append((choice.finish_reason, choice.message.content or "", calls))
    streamed = await server.chat("go", seed=9, n=6, max_tokens=600, stream=True, **fields)
    for index in range(6):
        message = joined(streamed.text, index)
        found.append((message["finish"], message["content"], [(name, text) for _, name, text in message["calls"]]))
    return found


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
async def test_required_calls_validate(run_server: RunServer, format: ToolFormat, tmp_path: Path) -> None:
    model = make_model(tmp_path, format, None)
    async with run_server(**served(model, 1)) as server:
        answers = await ask(server, tools=TOOLS, tool_choice="required")
        named = await ask(server, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})

    ended = [answer for answer in answers if answer[0] != "length"]
    assert len(ended) >= 6
    for finish, content, calls in ended:
        assert (finish, content) == ("tool_calls", "")
        assert calls
        for call in calls:
            check(*call)
    assert {name for _, _, calls in ended for name, _ in calls} == set(SCHEMAS)
    for finish, content, ((name, arguments),) in named:
        assert (finish, content, name, json.loads(arguments)) == ("tool_calls", "", "now", {})


@pytest.mark.parametrize("name", ["hermes", "mistral"])
async def test_calls_of_strict_tools_validate(run_server: RunServer, tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path, ToolFormat(name, "array"), None)
    async with run_server(**served(model, 2)) as server:
        answers = await ask(server, tools=STRICT)

    calls = [call for finish, _, calls in answers if finish != "length" for call in calls]
    for call in calls:
        check(*call)
    assert calls
    assert any(finish == "stop" for finish, _, _ in answers)


async def test_an_answer_of_a_form_or_calls(run_server: RunServer, tmp_path: Path) -> None:
    model = make_model(tmp_path, ToolFormat("hermes"), None)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["yes", "no"]}}}
    async with run_server(**served(model, 3)) as server:
        answers = await ask(server, tools=TOOLS, response_format=form)

    ended = [answer for answer in answers if answer[0] != "length"]
    assert {finish for finish, _, _ in ended} == {"stop", "tool_calls"}
    for finish, content, calls in ended:
        if finish == "stop":
            assert json.loads(content) in ("yes", "no")
        for call in calls:
            check(*call)


@pytest.mark.feature("Reasoning", "Thinking switched and bounded")
async def test_thinking_is_free_and_bounded(run_server: RunServer, tmp_path: Path) -> None:
    model = make_model(tmp_path, ToolFormat("hermes"))
    fields = {
        "n": 8,
        "max_tokens": 800,
        "seed": 1,
        "chat_template_kwargs": {"enable_thinking": True},
        "max_thinking_tokens": 20,
    }
    async with run_server(**served(model, 4)) as server:
        calls = await server.chat("go", tools=TOOLS, tool_choice="required", **fields)
        free = await server.chat("go", **{**fields, "max_tokens": 40, "n": 1})
        none = await server.chat("go", tools=TOOLS, tool_choice="required", **{**fields, "max_thinking_tokens": 0})

    answer = ChatCompletion.model_validate_json(calls.content)
    ended = [choice.message for choice in answer.choices if choice.finish_reason != "length"]
    assert len(ended) >= 4
    for message in ended:
        for call in message.tool_calls:
            check(call.function.name, call.function.arguments)
    assert any(message.reasoning_content for message in ended)
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 8 * 21
    assert free.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 21
    assert none.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 8
    assert all("reasoning_content" not in choice["message"] for choice in none.json()["choices"])


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_of_a_form_comes_after_the_thinking(run_server: RunServer, tmp_path: Path, stream: bool) -> None:
    model = make_model(tmp_path, None)
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS["weather"], "strict": True}}
    fields = {"n": 8, "max_tokens": 800, "seed": 1, "max_thinking_tokens": 20, "response_format": form, "logprobs": True}
    async with run_server(**served(model, 5)) as server:
        answer = await server.chat("go", stream=stream, chat_template_kwargs={"enable_thinking": True}, **fields)

    assert answer.status_code == 200, answer.text
    if stream:
        messages = [joined(answer.text, index) for index in range(8)]
        found = [(each["finish"], each["reasoning"], each["content"]) for each in messages]
    else:
        choices = ChatCompletion.model_validate_json(answer.content).choices
        found = [(each.finish_reason, each.message.reasoning_content or "", each.message.content) for each in choices]
    ended = [(reasoning, content) for finish, reasoning, content in found if finish == "stop"]
    assert len(ended) >= 4
    assert any(reasoning for reasoning, _ in ended)
    for _, content in ended:
        check("weather", content)
