"""Held to transformers' `apply_chat_template`, on templates of the kinds that models have."""

from typing import Any

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from dashinfer.errors import InvalidRequest, UnsupportedModel
from dashinfer.sources import TokenizerFiles
from dashinfer.text.chat_template import ChatTemplate

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- {"name": call.name, "parameters": call.arguments} | tojson }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson) + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}
"""
PARTS = """\
{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}[{{ part.text }}]{% endfor %}{% endif %}</{{ message.role }}>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
LOOPS = """\
{% set found = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}
{%- set found.last = loop.index0 %}{% continue %}{% endif %}{{ message.content | upper }}|{% endfor %}{{ found.last }}"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

SHORT = [{"role": "user", "content": "Hello <b>&\u2028 'ñ' \"你\""}]
LONG = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "  Yes? "},
    {"role": "user", "content": "Why\n\nthat\n"},
]
SYSTEM = [{"role": "system", "content": " Be brief. "}, *SHORT]
TOOLS = [
    *SHORT,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": "<é>"}}}],
    },
    {"role": "tool", "content": "4 > 3", "tool_call_id": "1"},
]


def oracle(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    bare = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=source, **SPECIAL)
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHATML, SHORT), (CHATML, LONG), (CHATML, SYSTEM), (LLAMA3, SHORT), (LLAMA3, LONG), (LLAMA3, SYSTEM), (LLAMA3, TOOLS),
        (MISTRAL, SHORT), (MISTRAL, LONG), (PARTS, LONG), (LOOPS, LONG),
        (PARTS, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_same_prompt_as_transformers(source: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    expected = oracle(source, messages, add_generation_prompt=add_generation_prompt)

    assert ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=add_generation_prompt) == expected


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, PARTS])
@pytest.mark.parametrize("text", ["The answer is", "The answer is ", "x"])
def test_same_open_message_as_transformers(source: str, text: str) -> None:
    messages = [*SHORT, {"role": "assistant", "content": text}]
    expected = oracle(source, messages, continue_final_message=True)
    found = ChatTemplate(source, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True)

    assert found == expected
    assert found.rstrip().endswith(text.rstrip())


def test_same_open_parts_as_transformers() -> None:
    messages = [*SHORT, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]}]
    expected = oracle(PARTS, messages, continue_final_message=True)

    assert ChatTemplate(PARTS, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_images_need_a_template_that_goes_through_parts() -> None:
    image, words = {"type": "image"}, {"type": "text", "text": "a"}
    messages = [{"role": "user", "content": [image, words]}]

    assert ChatTemplate(PARTS, {}).render(messages).startswith("<user>[][a]</user>")
    with pytest.raises(InvalidRequest, match="takes text only"):
        ChatTemplate(CHATML, {}).render(messages)


def test_an_image_is_no_text_to_continue() -> None:
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    with pytest.raises(InvalidRequest, match="ends with no text"):
        ChatTemplate(PARTS, {}).render(messages, add_generation_prompt=False, continue_final_message=True)


def test_kwargs_reach_the_template() -> None:
    source = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"

    assert ChatTemplate(source, {}).render(SHORT, kwargs={"enable_thinking": False}) == "<think></think>"
    assert ChatTemplate(source, {}).render(SHORT) == ""


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_reserved_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot set {name}") as caught:
        ChatTemplate(CHATML, SPECIAL).render(SHORT, kwargs={name: "x"})

    assert caught.value.param == "chat_template_kwargs"


def test_text_parts_become_one_string_where_the_template_wants_one() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    template = ChatTemplate(CHATML, SPECIAL)

    assert template.content_format == "string"
    assert "user\na\nb<|im_end|>" in template.render(messages)


def test_strings_become_parts_where_the_template_knows_nothing_else() -> None:
    source = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }};{% endfor %}{% endfor %}"
    template = ChatTemplate(source, {})

    assert template.content_format == "parts"
    assert template.render(SHORT) == SHORT[0]["content"] + ";"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{% set c = m.content %}{% for part in c %}{{ part.text }}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{% for part in m.content | selectattr('type') %}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}{% endfor %}{% endfor %}", "string"),
        (CHATML, "string"),
        (LLAMA3, "string"),
        (PARTS, "parts"),
    ],
)
def test_content_format(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).content_format == expected


def test_null_content() -> None:
    messages = [*SHORT, {"role": "assistant", "content": None}]

    assert ChatTemplate(CHATML, SPECIAL).render(messages, add_generation_prompt=False).endswith("assistant\n<|im_end|>\n")
    assert ChatTemplate("{{ messages[1].content is none }}", {}).render(messages) == "True"


def test_developer_is_system_unless_the_template_knows_it() -> None:
    messages = [{"role": "developer", "content": "x"}]

    assert ChatTemplate("{{ messages[0].role }}", {}).render(messages) == "system"
    assert ChatTemplate("{{ messages[0].role }}{# developer #}", {}).render(messages) == "developer"


def test_what_the_template_refuses_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        ChatTemplate(MISTRAL, SPECIAL).render([*SHORT, *SHORT])

    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[5].content }}",
        "{{ messages + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].pop('role') }}",
        "{% for i in range(10000000) %}x{% endfor %}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_the_clients_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template fails"):
        ChatTemplate(source, {}).render(SHORT)


def test_no_template() -> None:
    template = ChatTemplate.from_files(TokenizerFiles(tokenizer_json=None), {})
    with pytest.raises(InvalidRequest, match="no chat template"):
        template.render(SHORT)


def test_an_invalid_template_is_refused_at_start() -> None:
    with pytest.raises(UnsupportedModel, match="not valid"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(("content", "words"), [(None, "no text to continue"), ("gone", "leaves the final message out")])
def test_nothing_to_continue(content: Any, words: str) -> None:
    source = "{% for m in messages %}{% if m.content is none or m.role == 'user' %}x{% endif %}{% endfor %}"
    with pytest.raises(InvalidRequest, match=words):
        ChatTemplate(source, {}).render(
            [*SHORT, {"role": "assistant", "content": content}], add_generation_prompt=False, continue_final_message=True
        )


def test_messages_are_not_changed() -> None:
    messages = [*SHORT, {"role": "assistant", "content": "x"}]
    before = [dict(message) for message in messages]
    ChatTemplate(CHATML, SPECIAL).render(messages, add_generation_prompt=False, continue_final_message=True)

    assert messages == before
