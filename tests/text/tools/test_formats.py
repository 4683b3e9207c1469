"""Formats of calls by templates of the kinds that models have, which show tools and calls as transformers does."""

import json
from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dashinfer.errors import InvalidRequest
from dashinfer.text.chat_template import ChatTemplate
from dashinfer.text.tools.events import Arguments, CallBegin, merged
from dashinfer.text.tools.formats import ToolFormat, tool_format

pytestmark = pytest.mark.feature("Tools", "Calls of tools, whole or streamed")

# Qwen2.5 and 3: tools in the system message, results in one user message, thinking of the last turn alone.
QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- "<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools>\\nSay <tool_call>\\n{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == "user" and message.content is string %}
        {%- set ns.found = true %}{%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# Llama 3.1: tools before the first user message, one call a message, results of the role ipython.
LLAMA = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string }}
{%- if builtin_tools is defined or tools is not none %}{{- "\\nEnvironment: ipython" }}{%- endif %}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- set first = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception("one call at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Mistral: tools before the last user message, identifiers of nine characters.
MISTRAL = """\
{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val | tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function | tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- elif message["role"] == "tool" or message["role"] == "tool_results" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}"""

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather <of> a 'city' & more: é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"id": "aB3456789", "type": "function", "function": {"name": "weather", "arguments": {"city": "<Málaga>"}}}
TURN = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "aB3456789", "name": "weather", "content": "mild"},
]
TEMPLATES = {"hermes": QWEN, "llama3_json": LLAMA, "mistral": MISTRAL}


def oracle(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=source, **SPECIAL)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("tools", [TOOLS, None], ids=["tools", "none"])
@pytest.mark.parametrize("messages", [TURN[:1], TURN, [*TURN, TURN[0]]], ids=["question", "result", "next"])
def test_same_prompt_as_transformers(source: str, tools: Any, messages: list[dict[str, Any]]) -> None:
    template = ChatTemplate(source, SPECIAL)

    assert template.render(messages, tools=tools) == oracle(source, messages, tools=tools)
    assert "tools" in template.reads


def test_thinking_in_history_and_switched_off() -> None:
    messages = [*TURN[:1], {**TURN[1], "reasoning_content": "Hm.", "reasoning": "Hm."}, TURN[2]]
    template = ChatTemplate(QWEN, SPECIAL)
    shown = template.render(messages, tools=TOOLS, kwargs={"enable_thinking": False})

    assert shown == oracle(QWEN, messages, tools=TOOLS, enable_thinking=False)
    assert "<think>\nHm.\n</think>" in shown
    assert shown.endswith("<think>\n\n</think>\n\n")
    assert {"enable_thinking", "tools"} <= template.reads
    assert "reasoning_effort" not in template.reads


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_in_the_history_is_what_the_parser_reads(name: str) -> None:
    """The template's own way of writing a call, taken from between the question and the result."""
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    before, after = (template.render(TURN[:count], tools=TOOLS) for count in (1, 2))
    written = after[len(before) :] if after.startswith(before) else after.partition("[/INST]")[2]
    written = written.partition("<|im_end|>")[0].partition("<|eot_id|>")[0].partition("</s>")[0]
    found = tool_format("auto", TEMPLATES[name], lambda _: None)
    assert found is not None
    parser = found.parser({"weather": {}})

    begin, arguments = merged([*parser.push(written), *parser.finish()])
    assert begin == CallBegin(0, "weather")
    assert isinstance(arguments, Arguments)
    assert json.loads(arguments.text) == CALL["function"]["arguments"]


def test_what_a_template_refuses_is_the_clients_error() -> None:
    two = [TURN[0], {**TURN[1], "tool_calls": [CALL, CALL]}]

    with pytest.raises(InvalidRequest, match="one call at once"):
        ChatTemplate(LLAMA, SPECIAL).render(two, tools=TOOLS)


XML = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call><function=x><parameter=y></parameter></function></tool_call>"
PYTHONIC = "{{ tools }} Write [func_name1(params_name1=params_value1, params_name2=params_value2), func_name2(params)]"
NAMED = "{{ tools }}{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"
WITH_ID = "{{ tools }}{{ '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' + arguments }}"


@pytest.mark.parametrize(
    ("name", "template", "tokens", "expected"),
    [
        ("auto", QWEN, (), ToolFormat("hermes")),
        ("auto", LLAMA, (), ToolFormat("llama3_json")),
        ("auto", MISTRAL, (), ToolFormat("mistral", "array")),
        ("auto", NAMED, (), ToolFormat("mistral", "args")),
        ("auto", WITH_ID, (), ToolFormat("mistral", "call_id")),
        ("auto", XML, (), ToolFormat("qwen3_coder")),
        ("auto", PYTHONIC, (), ToolFormat("pythonic")),
        ("auto", "{{ tools }}", ("<|python_tag|>",), ToolFormat("llama3_json")),
        ("auto", "{{ tools }}", ("[TOOL_CALLS]",), ToolFormat("mistral", "array")),
        ("auto", "{{ tools }}", (), None),
        ("auto", "{{ messages }}", ("<|python_tag|>",), None),
        ("auto", None, (), None),
        ("none", QWEN, (), None),
        ("pythonic", QWEN, (), ToolFormat("pythonic")),
        ("hermes", None, (), ToolFormat("hermes")),
    ],
)
def test_formats_are_found(name: Any, template: str | None, tokens: tuple[str, ...], expected: ToolFormat | None) -> None:
    assert tool_format(name, template, lambda text: 1 if text in tokens else None) == expected


def test_identifiers() -> None:
    for name, size in (("hermes", 29), ("mistral", 9)):
        ids = {ToolFormat(name).new_id() for _ in range(100)}

        assert len(ids) == 100
        assert {len(id) for id in ids} == {size}


def test_a_template_for_tools_alone() -> None:
    template = ChatTemplate(
        "plain {{ messages[0].content }}", SPECIAL, "{{ tools[0].function.name }} {{ messages[0].content }}"
    )

    assert template.render(TURN[:1]) == "plain Weather?"
    assert template.render(TURN[:1], tools=TOOLS) == "weather Weather?"
    assert ("tools" in template.reads, "tools" in template.for_tools.reads) == (False, True)
