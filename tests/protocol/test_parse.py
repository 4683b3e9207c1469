import json
from typing import Any

import pytest

from dashinfer.errors import InvalidRequest
from dashinfer.protocol.chat import MAX_MESSAGES, ChatCompletionRequest
from dashinfer.protocol.fields import MAX_BIASES
from dashinfer.protocol.parse import parse_chat_request
from dashinfer.vision.request import MediumRequest

TEXT = {"type": "text", "text": "x"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
USER = {"role": "user", "content": "hi"}
URL = "http://example.com/a"


def parse(**fields: Any) -> ChatCompletionRequest:
    return parse_chat_request(json.dumps({"model": "m", "messages": [USER], **fields}).encode())


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    error = caught.value

    assert (error.status, error.type) == (400, "invalid_request_error")
    assert "\n" not in error.message
    assert len(error.message) < 300
    return error


def test_defaults() -> None:
    request = parse()

    assert request.n == 1
    assert request.stop == []
    assert request.token_limit is None
    assert (request.stream, request.include_usage, request.logprobs) == (False, False, False)
    assert (request.skip_special_tokens, request.add_generation_prompt, request.continue_final_message) == (True, True, False)
    assert request.template_messages() == [USER]


def test_every_field() -> None:
    request = parse(
        temperature=0, top_p=0.5, n=2, max_tokens=5, max_completion_tokens=7, stop="x", seed=-1, presence_penalty=-2,
        frequency_penalty=2, logit_bias={"5": -100, "6": 1}, logprobs=True, top_logprobs=20, stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False}, user="u", top_k=-1, min_p=0.1,
        repetition_penalty=1.1, min_tokens=2, stop_token_ids=[3], ignore_eos=True, skip_special_tokens=False,
        chat_template_kwargs={"enable_thinking": False}, continue_final_message=True, store=False, metadata={"a": "b"},
        service_tier="auto", safety_identifier="s", prompt_cache_key="k", parallel_tool_calls=True, tools=[],
        tool_choice="none", response_format={"type": "text"}, modalities=["text"],
    )  # fmt: skip

    assert request.token_limit == 7
    assert request.stop == ["x"]
    assert request.logit_bias == {5: -100.0, 6: 1.0}
    assert request.include_usage
    assert not request.add_generation_prompt


def test_nulls_are_fields_left_out() -> None:
    names = [name for name in ChatCompletionRequest.model_fields if name not in ("model", "messages")]

    assert parse(**dict.fromkeys(names), audio=None, functions=None) == parse()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.1}, "temperature", "is 2.1; it must be at most 2"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"temperature": "1"}, "temperature", 'must be a number, not the string "1"'),
        ({"temperature": True}, "temperature", "must be a number, not true"),
        ({"top_p": 0}, "top_p", "more than 0"),
        ({"top_p": 1.1}, "top_p", "at most 1"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 17}, "n", "at most 16"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": 1.5}, "max_tokens", "an integer, not 1.5"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "at least 1"),
        ({"stop": ""}, "stop.0", "must not be empty"),
        ({"stop": ["a", ""]}, "stop.1", "must not be empty"),
        ({"stop": 3}, "stop", "a string or an array of strings"),
        ({"stop": ["a"] * 17}, "stop", "more than 16 items"),
        ({"stop": "a" * 1001}, "stop.0", "longer than 1000 characters"),
        ({"seed": 2**63}, "seed", "at most 9223372036854775807"),
        ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "at least -2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "'a', which is no token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "at most 100"),
        ({"logit_bias": [5]}, "logit_bias", "an object, not an array"),
        ({"logit_bias": {str(i): 0 for i in range(MAX_BIASES + 1)}}, "logit_bias", "more than 1024 items"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"logprobs": 5}, "logprobs", "true or false, not 5"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs `stream`"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not a field"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"min_p": 1.5}, "min_p", "at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty", "is 1e-300; it must be at least 0.01"),
        ({"repetition_penalty": 101}, "repetition_penalty", "at most 100"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", "is 6, more than the 5"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0", "at least 0"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "excludes"),
        ({"temprature": 1}, "temprature", "not a field this server knows"),
        ({"x" * 5000: 1}, "x" * 100 + "...", "not a field"),
        ({"a\nb": 1}, "'a\\nb'", "not a field"),
        ({"model": 3}, "model", "a string, not 3"),
        ({"model": ""}, "model", "must not be empty"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hi"}, "messages", 'an array, not the string "hi"'),
        ({"messages": None}, "messages", "is required"),
        ({"messages": ["hi"]}, "messages.0", "an object"),
        ({"messages": [USER, {"role": "robot", "content": ""}]}, "messages.1.role", "must be one of system, developer"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "must be one of"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "a string or an array of parts, not null"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "must not be empty"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0", "must be an object such as {"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "is required"),
        ({"messages": [{"role": "user", "content": [TEXT] * 1025}]}, "messages.0.content", "more than 1024 items"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL] * 129}]}, "messages.0.tool_calls", "more than 128 items"),
        ({"messages": [{**USER, "mood": 1}]}, "messages.0.mood", "not a field"),
        ({"messages": [USER] * (MAX_MESSAGES + 1)}, "messages", "more than 4096 items"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**fields)

    assert error.param == param
    assert words in error.message


def media(*parts: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "user", "content": [TEXT, *parts]}]}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image_url", "image_url": URL}, {}),
        ({"type": "image_url", "image_url": {"url": URL}}, {}),
        ({"type": "image", "image": URL, "max_pixels": 9}, {"max_pixels": 9}),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "auto"}}, {}),
        (
            {
                "type": "image_url",
                "image_url": {"url": URL, "detail": "low", "min_pixels": 5},
                "min_pixels": 6,
                "max_pixels": 9,
            },
            {"low_detail": True, "min_pixels": 5, "max_pixels": 9},
        ),
        ({"type": "video_url", "video_url": URL}, {"kind": "video"}),
        (
            {"type": "video_url", "video_url": {"url": URL, "fps": 2}, "max_frames": 7},
            {"kind": "video", "fps": 2, "max_frames": 7},
        ),
        ({"type": "video", "video": URL}, {"kind": "video"}),
        (
            {"type": "video", "video": [URL, "b"], "fps": 1.5},
            {"kind": "video", "sources": (URL, "b"), "frames": True, "fps": 1.5},
        ),
    ],
)
def test_images_and_videos(part: dict[str, Any], expected: dict[str, Any]) -> None:
    request = parse(**media(part))

    fields = {"kind": "image", "sources": (URL,), "param": "messages.1.content.1", **expected}
    assert request.media() == [MediumRequest(**fields)]
    assert request.template_messages()[1]["content"] == [TEXT, {"type": fields["kind"]}]


def test_media_have_the_order_of_the_messages() -> None:
    image, video = {"type": "image", "image": "a"}, {"type": "video", "video": "b"}
    messages = [{"role": role, "content": [image, TEXT, video]} for role in ("system", "user", "assistant", "tool")]

    found = parse(messages=messages).media()

    assert [medium.sources[0] for medium in found] == ["a", "b"] * 4
    assert found[-1].param == "messages.3.content.2"


@pytest.mark.parametrize(
    ("part", "param", "words"),
    [
        ({"type": "image_url"}, ".image_url", "is required"),
        ({"type": "image_url", "image_url": 3}, ".image_url", "a string or an object, not 3"),
        ({"type": "image_url", "image_url": ""}, ".image_url", "must not be empty"),
        ({"type": "image_url", "image_url": {"url": 3}}, ".image_url.url", "a string, not 3"),
        ({"type": "image_url", "image_url": {"url": URL, "x": 3}}, ".image_url.x", "not a field"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "tiny"}}, ".image_url.detail", "'low', 'high' or 'auto'"),
        ({"type": "image", "image": URL, "min_pixels": 0}, ".min_pixels", "at least 1"),
        ({"type": "image", "image": URL, "fps": 1}, ".fps", "not a field"),
        ({"type": "image", "image": [URL]}, ".image", "a string, not an array"),
        ({"type": "video", "video": 3}, ".video", "a string or an array of strings, not 3"),
        ({"type": "video", "video": []}, ".video", "must not be empty"),
        ({"type": "video", "video": [URL, 3]}, ".video.1", "a string, not 3"),
        ({"type": "video", "video": [URL] * 1025}, ".video", "more than 1024 items"),
        ({"type": "video_url", "video_url": {"url": URL, "fps": 0}}, ".video_url.fps", "more than 0"),
        ({"type": 3}, "", "needs a `type`, which is one of text, image_url, image, video_url, video"),
    ],
)
def test_bad_parts_are_named(part: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**media(part))

    assert error.param == "messages.1.content.1" + param
    assert words in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}, "messages.0.function_call"),
    ],
)
def test_what_is_not_supported_is_said(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)

    assert (error.param, error.code) == (param, "unsupported_parameter")


def test_a_prediction_has_its_shape() -> None:
    assert parse(prediction={"type": "content", "content": [{"type": "text", "text": "a"}]}).verbosity is None
    assert refusal(prediction={"type": "content"}).param == "prediction.content"
    assert refusal(prediction={"type": "x", "content": "a"}).param == "prediction.type"


def test_verbosity_is_one_of_three() -> None:
    assert parse(verbosity="low").verbosity == "low"
    assert refusal(verbosity="loud").param == "verbosity"


@pytest.mark.parametrize("fields", [{"reasoning_content": "Hm"}, {"reasoning": "Hm"}])
def test_thinking_reaches_the_template_by_both_names(fields: dict[str, str]) -> None:
    parsed = {**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {"x": 1}}}
    message = {"role": "assistant", "content": "4", "tool_calls": [parsed], "parsed": None, **fields}
    (shown,) = parse(messages=[message]).template_messages()

    assert (shown["reasoning_content"], shown["reasoning"]) == ("Hm", "Hm")
    assert shown["tool_calls"] == [{**CALL, "function": {"name": "f", "arguments": {"x": 1}}}]


def test_no_calls_are_not_there() -> None:
    (shown,) = parse(messages=[{"role": "assistant", "content": "4", "tool_calls": []}]).template_messages()

    assert shown == {"role": "assistant", "content": "4"}


def test_tools_that_may_be_called() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    named = {"type": "function", "function": {"name": "g"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}

    def what(**fields: Any) -> tuple[list[str], bool, int | None]:
        request = parse(tools=tools, **fields)
        return [function.name for function in request.functions()], request.call_required, request.max_calls

    assert what() == what(tool_choice="auto") == (["f", "g"], False, None)
    assert what(tool_choice="none") == ([], False, None)
    assert what(tool_choice="required", parallel_tool_calls=False) == (["f", "g"], True, 1)
    assert what(tool_choice=named) == (["g"], True, 1)
    assert what(tool_choice=allowed, parallel_tool_calls=True) == (["g"], False, None)
    assert parse(tools=tools, tool_choice="none").template_tools() is None


NOW = {"type": "function", "function": {"name": "now"}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tools": [NOW, NOW]}, "tools", "two functions with the name now"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "1 to 128 letters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
         "tools.0.function.parameters", "`type` object"),
        ({"tools": [NOW] * 129}, "tools", "more than 128"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", 'must be "none", "auto", "required"'),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice.function", "is required"),
        ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "none of `tools`"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"reasoning_effort": "most"}, "reasoning_effort", "'none', 'minimal'"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens", "at least 0"),
    ],
)  # fmt: skip
def test_bad_tools_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(**fields)

    assert error.param == param
    assert words in error.message


def test_tool_choice_without_tools() -> None:
    assert refusal(tool_choice="required").param == "tool_choice"
    assert parse(tool_choice="auto").tool_choice == "auto"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object, not an array"),
        (b"null", "must be a JSON object, not null"),
        (b"{} {}", "not valid JSON"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"model": "\\ud800\\u0041"}', "surrogate"),
        (b'{"model": "\\udc00"}', "surrogate"),
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"chat_template_kwargs":' + b'{"a":' * 50_000, "nested too deeply"),
    ],
)
def test_bad_bodies(body: bytes, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_chat_request(body)


def test_whole_surrogate_pairs_are_characters() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"\\ud83d\\ude42"}]}'

    assert parse_chat_request(body).template_messages() == [{"role": "user", "content": "🙂"}]


def test_a_flood_of_errors_costs_one() -> None:
    fields = {f"field{i}": i for i in range(10_000)}
    messages = [{"role": "user", "content": [{"type": "text"}] * 300}] * 300

    assert refusal(**fields).param == "field0"
    assert refusal(messages=[{**USER, **fields}]).param == "messages.0.field0"
    assert refusal(messages=messages).param == "messages.0.content.0.text"


def test_a_tool_conversation_reaches_the_template() -> None:
    half = {"id": "3", "type": "function", "function": {"name": "f", "arguments": '{"x": "\\ud800"}'}}
    odd = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{broken"}}
    echoed = {"role": "assistant", "content": None, "tool_calls": [CALL, odd, half], "refusal": None, "audio": None,
              "function_call": None, "annotations": []}  # fmt: skip
    request = parse(messages=[{**USER, "name": "Ann"}, echoed, {"role": "tool", "content": "4", "tool_call_id": "1"}])
    user, assistant, tool = request.template_messages()

    assert user == {**USER, "name": "Ann"}
    assert assistant["content"] is None
    assert [made["function"]["arguments"] for made in assistant["tool_calls"]] == [{"x": 1}, "{broken", '{"x": "\\ud800"}']
    assert assistant.keys() == {"role", "content", "tool_calls"}
    assert tool == {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"}


def test_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert parse(messages=[{"role": "user", "content": parts}]).template_messages() == [{"role": "user", "content": parts}]


def test_a_large_body_holds_media_and_not_millions_of_items() -> None:
    flood = b'{"messages": [' + b"[]," * (4 << 20) + b"[]]}"
    media = b'{"messages": [{"role": "user", "content": "' + b"A" * (9 << 20) + b'"}], "model": "m"}'

    with pytest.raises(InvalidRequest, match="items"):
        parse_chat_request(flood)
    assert len(parse_chat_request(media).messages) == 1
