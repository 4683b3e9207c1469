"""Tools and thinking through the routes: what clients send and get. The model's output is what the prompt tells it to say."""

import json
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import trio

from dashinfer.guidance.guide import Grammar
from dashinfer.guidance.spec import Constraint
from dashinfer.protocol.chat import ChatCompletion
from dashinfer.serving.service import TextModel
from dashinfer.sources import ModelSource
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.text.reasoning import REASONING_FORMATS
from dashinfer.text.tokenizer import Tokenizer
from dashinfer.text.tools.formats import ToolFormat
from dashinfer.types import ModelFiles

from .conftest import Running, RunServer
from .fake_engine import INFO, FakeEngine, write_tokenizer
from .test_chat import chunks_of

pytestmark = pytest.mark.feature("Tools", "Calls of tools, whole or streamed")

TEMPLATE = """\
{%- if tools %}{{ tools | tojson }}
{% endif %}
{%- for message in messages %}{{ message.role }}{% if message.name %} {{ message.name }}{% endif %}: {{ message.content }}
{%- if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.city }}]{% endfor %}
{%- if not loop.last %}{{ "\n" }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|end|>
{%- if enable_thinking is defined %}{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}
{%- if reasoning_effort %}({{ reasoning_effort }}){% endif %}{% if verbosity %}({{ verbosity }}){% endif %}{% endif %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>{"name":"weather","arguments":{"city":"Paris"}}</tool_call>'
OTHER = '<tool_call>{"name":"now","arguments":{}}</tool_call>'


def make_model(folder: Path, tools: ToolFormat | None, reasoning: str | None = "qwen3", template: str = TEMPLATE) -> TextModel:
    files = write_tokenizer(folder, template, ["<think>", "</think>", "<tool_call>", "</tool_call>"], ["[TOOL_CALLS]"])
    tokenizer = Tokenizer.from_source(ModelSource(ModelFiles("fake", "safetensors", (), {}), files))
    parts = ChatTemplate.from_files(files, tokenizer.special_tokens)
    return TextModel(tokenizer, parts, {}, None, tools, REASONING_FORMATS[reasoning] if reasoning else None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return make_model(tmp_path_factory.mktemp("model"), ToolFormat("hermes"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return make_model(tmp_path_factory.mktemp("mistral"), ToolFormat("mistral", "array"), None)


class MarkingEngine(FakeEngine):
    """Has logits for markers too."""

    def __init__(self) -> None:
        super().__init__()
        self.model = msgspec.structs.replace(INFO, vocab_size=264)


def recorded(server: Running) -> list[Constraint]:
    """The constraints that are compiled from now on."""
    seen: list[Constraint] = []
    compile_ = server.service.compile

    async def record(constraint: Constraint) -> Grammar:
        seen.append(constraint)
        return await compile_(constraint)

    server.service.compile = record
    return seen


def prompt_of(server: Running, model: TextModel, number: int = -1) -> str:
    return model.tokenizer.decode(server.engine.submitted[number][0], skip_special_tokens=False)


def joined(text: str, index: int = 0) -> dict[str, Any]:
    """The message that a stream's deltas add up to."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish": None}
    for chunk in chunks_of(text):
        for choice in chunk.choices:
            if choice.index != index:
                continue
            message["finish"] = choice.finish_reason or message["finish"]
            message["content"] += choice.delta.content or ""
            message["reasoning"] += choice.delta.reasoning_content or ""
            assert choice.delta.reasoning == choice.delta.reasoning_content
            for call in choice.delta.tool_calls or ():
                if call.index == len(message["calls"]):
                    assert call.type == "function"
                    message["calls"].append([call.id, call.function.name, ""])
                else:
                    assert call.id is None
                    assert call.function.name is None
                message["calls"][call.index][2] += call.function.arguments
    return message


async def answers(run_server: RunServer, model: TextModel, text: str, at_once: int, **fields: Any) -> tuple[Any, Any, Running]:
    """The same question, whole and streamed."""
    async with run_server(model=model) as server:
        server.engine.at_once = at_once
        whole = await server.chat(f"say {text}", **fields)
        assert whole.status_code == 200, whole.text
        streamed = await server.chat(f"say {text}", stream=True, stream_options={"include_usage": True}, **fields)
    return ChatCompletion.model_validate_json(whole.content), streamed.text, server


@pytest.mark.feature("Reasoning", "Thinking apart from the answer")
@pytest.mark.parametrize("at_once", [1, 7, 1000])
@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (f"Let me see.\n{CALL}\n{OTHER}", "Let me see.", "", [("weather", '{"city":"Paris"}'), ("now", "{}")]),
        (f"<think>\nParis?\n</think>\n\n{CALL}", None, "Paris?", [("weather", '{"city":"Paris"}')]),
        ("<think>Hm.</think>Yes.", "Yes.", "Hm.", []),
        ("A <tool_call> is no call.", "A <tool_call> is no call.", "", []),
        ("Yes.", "Yes.", "", []),
    ],
)
async def test_calls_and_thinking(
    run_server: RunServer, model: TextModel, at_once: int, text: str, content: str | None, reasoning: str, calls: list[Any]
) -> None:
    whole, streamed, _ = await answers(run_server, model, text, at_once, tools=[WEATHER, NOW], n=2)

    finish = "tool_calls" if calls else "stop"
    for choice in whole.choices:
        message = choice.message
        assert (message.content, choice.finish_reason) == (content, finish)
        assert (message.reasoning_content, message.reasoning) == (reasoning or None, reasoning or None)
        assert [(call.function.name, call.function.arguments) for call in message.tool_calls or ()] == calls
        shown = joined(streamed, choice.index)
        assert (shown["content"], shown["reasoning"], shown["finish"]) == (content or "", reasoning, finish)
        assert [tuple(call[1:]) for call in shown["calls"]] == calls
    ids = [call.id for choice in whole.choices for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith("call_") and len(id) == 29 for id in ids)
    # The markers are one token each, the rest are bytes.
    thought = (len(text.partition("</think>")[0].removeprefix("<think>")) + 2) * 2 if reasoning else 0
    assert whole.usage.completion_tokens_details.reasoning_tokens == thought
    assert chunks_of(streamed)[-1].usage == whole.usage


async def test_without_tools_nothing_is_a_call(run_server: RunServer, model: TextModel) -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
        whole, streamed, server = await answers(run_server, model, CALL, 3, **fields)

        assert whole.choices[0].message.content == joined(streamed)["content"] == CALL
        assert whole.choices[0].finish_reason == "stop"
        assert 'weather","desc' not in prompt_of(server, model).replace(" ", "")


async def test_the_template_sees_the_tools(run_server: RunServer, model: TextModel) -> None:
    _, _, server = await answers(run_server, model, "Yes.", 9, tools=[WEATHER, NOW])
    first, _, _ = prompt_of(server, model).partition("\n")

    assert json.loads(first) == [
        WEATHER, {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    ]  # fmt: skip


async def test_one_call_where_no_more_are_wanted(run_server: RunServer, model: TextModel) -> None:
    fields = {"tools": [WEATHER, NOW], "parallel_tool_calls": False}
    for at_once in (1, 1000):
        whole, streamed, server = await answers(run_server, model, f"{CALL}{OTHER}", at_once, **fields)

        assert [call.function.name for call in whole.choices[0].message.tool_calls] == ["weather"]
        assert whole.choices[0].finish_reason == "tool_calls"
        assert [call[1] for call in joined(streamed)["calls"]] == ["weather"]
        assert server.engine.record.count("stop 0") == 2
        assert whole.usage.completion_tokens == len('{"name":"weather","arguments":{"city":"Paris"}}') + 1


async def test_a_call_that_is_cut_off(run_server: RunServer, model: TextModel) -> None:
    whole, streamed, _ = await answers(run_server, model, CALL, 1, tools=[WEATHER], max_tokens=40)
    (call,) = whole.choices[0].message.tool_calls

    assert whole.choices[0].finish_reason == joined(streamed)["finish"] == "length"
    assert call.function.arguments == joined(streamed)["calls"][0][2] == '{"city":"'


async def test_special_tokens_that_mark_calls_are_seen_and_not_shown(run_server: RunServer, mistral: TextModel) -> None:
    text = 'Yes [TOOL_CALLS][{"name":"weather","arguments":{"city":"Paris"}}]'
    whole, streamed, _ = await answers(run_server, mistral, text, 5, tools=[WEATHER])
    plain, _, _ = await answers(run_server, mistral, text, 5)

    (call,) = whole.choices[0].message.tool_calls
    assert (whole.choices[0].message.content, call.function.arguments) == ("Yes", '{"city":"Paris"}')
    assert len(call.id) == 9
    assert call.id.isalnum()
    assert joined(streamed)["calls"][0][1:] == ["weather", '{"city":"Paris"}']
    assert plain.choices[0].message.content == text.replace("[TOOL_CALLS]", "")
    assert plain.usage.completion_tokens_details is None


async def test_logprobs_are_those_of_all_the_text(run_server: RunServer, model: TextModel) -> None:
    text = f"<think>Hm.</think>Yes.{CALL}"
    whole, streamed, _ = await answers(run_server, model, text, 3, tools=[WEATHER], logprobs=True)
    found = [entry for chunk in chunks_of(streamed) for choice in chunk.choices if choice.logprobs
             for entry in choice.logprobs.content]  # fmt: skip

    assert "".join(entry.token for entry in whole.choices[0].logprobs.content) == text
    assert found == whole.choices[0].logprobs.content


async def test_a_stop_string_in_a_call(run_server: RunServer, model: TextModel) -> None:
    whole, streamed, _ = await answers(run_server, model, f"Yes.{CALL} and so on", 4, tools=[WEATHER], stop=["</tool"])

    assert whole.choices[0].message.content == "Yes."
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"city":"Paris"}'
    assert whole.choices[0].finish_reason == joined(streamed)["finish"] == "tool_calls"


async def test_history_reaches_the_template(run_server: RunServer, model: TextModel) -> None:
    async with run_server(model=model) as server:
        first = await server.chat(f"say <think>Hm</think>{CALL}", tools=[WEATHER])
        message = first.json()["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": [{"type": "text", "text": "mild"}]}
        messages = [{"role": "user", "content": "Paris?"}, message, result, {"role": "user", "content": "say Good."}]
        second = await server.client.post(
            "/v1/chat/completions", json={"model": "demo", "messages": messages, "tools": [WEATHER]}
        )

    assert second.json()["choices"][0]["message"]["content"] == "Good."
    _, _, shown = prompt_of(server, model).partition("\n")
    assert shown == "user: Paris?\nassistant: (Hm)[weather Paris]\ntool weather: mild\nuser: say Good.<|end|>"


@pytest.mark.feature("Reasoning", "Thinking switched and bounded")
@pytest.mark.parametrize(
    ("fields", "end", "reasoning"),
    [
        ({}, "<|end|>", None),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "<|end|><think>", "Yes."),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<|end|><think></think>", None),
        ({"reasoning_effort": "none"}, "<|end|><think></think>(none)", None),
        ({"reasoning_effort": "high"}, "<|end|>(high)", None),
        ({"reasoning_effort": "max"}, "<|end|>(max)", None),
        ({"verbosity": "low"}, "<|end|>(low)", None),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "<|end|><think>(none)", None),
    ],
)
async def test_thinking_is_switched_by_the_template(
    run_server: RunServer, model: TextModel, fields: dict[str, Any], end: str, reasoning: str | None
) -> None:
    whole, _, server = await answers(run_server, model, "Yes.", 1, **fields)

    assert prompt_of(server, model).endswith("say Yes." + end)
    assert whole.choices[0].message.reasoning_content == reasoning
    assert (whole.choices[0].message.content == "") == (reasoning is not None)


@pytest.mark.parametrize(
    ("fields", "words", "missing"),
    [
        ({"tools": [WEATHER]}, None, ()),
        ({"tools": [WEATHER], "tool_choice": "required"}, ["weather", "<think>"], ()),
        ({"tools": [WEATHER, NOW], "tool_choice": "required"}, ["weather", "now", 'group ("\\n"'], ()),
        ({"tools": [WEATHER, NOW], "tool_choice": "required", "parallel_tool_calls": False}, ["now"], ['group ("\\n"']),
        ({"tools": [WEATHER, NOW], "tool_choice": {"type": "function", "function": {"name": "now"}}}, ["now"], ["weather"]),
        (
            {
                "tools": [WEATHER, NOW],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]},
                },
            },
            ["now"],
            ["weather"],
        ),
        ({"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}]}, ["weather", "tail"], ()),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, ["calls | @answer"], ["tail"]),
        ({"response_format": {"type": "json_object"}}, ["thinking", "@answer"], ()),
        (
            {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": False}},
            ["start: %json"],
            ["thinking"],
        ),
        ({"max_thinking_tokens": 7}, ["max_tokens=7", "token*"], ()),
        ({"max_thinking_tokens": 7, "chat_template_kwargs": {"enable_thinking": False}}, None, ()),
    ],
)
async def test_constraints(
    run_server: RunServer, model: TextModel, fields: dict[str, Any], words: list[str] | None, missing: list[str]
) -> None:
    async with run_server(model=model, engine_type=MarkingEngine) as server:
        seen = recorded(server)
        answer = await server.chat("say Yes.", **fields)
        assert answer.status_code == 200, answer.text

    if words is None:
        assert seen == []
        return
    (constraint,) = seen
    grammar = constraint.grammar
    if grammar.startswith("{"):
        grammar = "\n".join(part["lark_grammar"] for part in json.loads(grammar)["grammars"])
    marker = str(model.tokenizer.marker_id("<think>"))
    assert [word for word in words if (marker if word == "<think>" else word) not in grammar] == []
    assert [word for word in missing if word in grammar] == []


async def test_models_without_tools_and_thinking(run_server: RunServer, text: TextModel, tmp_path: Path) -> None:
    blind = make_model(tmp_path, ToolFormat("hermes"), None, "{% for m in messages %}{{ m.content }}{% endfor %}")
    for served, fields, words in (
        (text, {"tools": [NOW]}, "--tool-call-parser"),
        (blind, {"tools": [NOW]}, "template takes none"),
        (text, {"max_thinking_tokens": 3}, "does not think"),
    ):
        async with run_server(model=served) as server:
            answer = await server.chat("say Yes.", **fields)

        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
        assert words in answer.json()["error"]["message"]


@pytest.mark.feature("Clients", "OpenAI's for Python")
async def test_the_openai_client_runs_a_tool(run_server: RunServer, model: TextModel) -> None:
    """A turn with a call, streamed, then one with its result."""

    def use(url: str) -> tuple[Any, Any]:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=10) as client:
            messages: list[Any] = [{"role": "user", "content": f"say <think>Hm</think>Wait. {CALL}{OTHER}"}]
            with client.chat.completions.stream(model="demo", messages=messages, tools=[WEATHER, NOW]) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_completion()
            message = final.choices[0].message
            messages.append(message)
            for call in message.tool_calls:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": "mild"})
            messages.append({"role": "user", "content": "say Done."})
            return (kinds, final), client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER, NOW])

    async with run_server(model=model) as server:
        (kinds, final), second = await trio.to_thread.run_sync(use, server.url)

    choice = final.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Wait."
    assert [json.loads(call.function.arguments) for call in choice.message.tool_calls] == [{"city": "Paris"}, {}]
    assert choice.message.reasoning_content == "Hm"
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert second.choices[0].message.content == "Done."
