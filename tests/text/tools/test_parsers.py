"""Outputs of models in each format, whole and cut into pieces."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, merged
from dashinfer.text.tools.hermes import HermesParser
from dashinfer.text.tools.llama import LlamaParser
from dashinfer.text.tools.mistral import MistralParser
from dashinfer.text.tools.parser import ToolParser
from dashinfer.text.tools.pythonic import PythonicParser
from dashinfer.text.tools.qwen_xml import QwenXmlParser

pytestmark = pytest.mark.feature("Tools", "Calls of tools, whole or streamed")

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "more": {"type": "object"},
            "note": {"type": ["string", "null"]},
            "any": {},
        },
    },
    "now": {"type": "object", "properties": {}},
}
PARSERS = {
    "hermes": HermesParser, "llama": LlamaParser, "mistral": MistralParser, "pythonic": PythonicParser, "xml": QwenXmlParser,
}  # fmt: skip
Call = tuple[str, str]


def make(name: str, **options: Any) -> ToolParser:
    return PARSERS[name](TOOLS, **options)


def run(parser: ToolParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.push(piece)]
    return merged([*events, *parser.finish()])


def outcome(events: list[Event]) -> tuple[str, list[Call]]:
    """The content and the calls; fails where a call is not well-formed."""
    content, calls = "", []
    for event in events:
        match event:
            case Content(text):
                content += text
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case Arguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
    return content, calls


CITY = '{"city": "Paris"}'
W = ("weather", CITY)
NOW = ("now", "{}")


# Text, what is content of it, and the calls.
OUTPUTS: dict[str, list[tuple[str, str, list[Call]]]] = {
    "hermes": [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [W]),
        ('Let me see.\n<tool_call>{"name":"weather","arguments":{"city": "Paris"}}</tool_call>', "Let me see.", [W]),
        (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
            "",
            [W, NOW],
        ),
        ('<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call> Done.', "Done.", [W]),
        ('<tool_call>{"name": "now"}</tool_call>', "", [NOW]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [NOW]),
        ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", [W]),
        ('<tool_call>{"type": "function", "name": "unknown", "arguments": {"a": [1, {}]}}</tool_call>', "",
         [("unknown", '{"a": [1, {}]}')]),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Paris"}\n</tool_call>', "", [W]),
        ('<tool_call>{"name": "now", "arguments": {"a": "x\ny\tz"}}', "", [("now", '{"a": "x\\ny\\tz"}')]),
        ('<tool_call>{"name": "now", "arguments": {"a": "</tool_call>\\u00e9 \\"q\\""}}</tool_call>', "",
         [("now", '{"a": "</tool_call>\\u00e9 \\"q\\""}')]),
        ('<tool_call>{"name": "now", "arguments": { "a" : [ -1.5e3 , true,null, [], {} ] } }</tool_call>', "",
         [("now", '{ "a" : [ -1.5e3 , true,null, [], {} ] }')]),
        # None of these is a call.
        ("", "", []),
        ("  two\n lines \n", "  two\n lines \n", []),
        ("a <tool_call> b", "a <tool_call> b", []),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ("<tool_call>{\"name\": 3}", "<tool_call>{\"name\": 3}", []),
        ('<tool_call>{"name": "now", "arguments": [1]}', '<tool_call>{"name": "now", "arguments": [1]}', []),
        ('<tool_call>{"name": "now", "argu', '<tool_call>{"name": "now", "argu', []),
        ("<tool_call>{name: now}</tool_call>", "<tool_call>{name: now}</tool_call>", []),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}', '<tool_call>{"name": "\\ud800", "arguments": {}}', []),
        # What comes after it is one all the same.
        ('<tool_call> x <tool_call>{"name": "now", "arguments": {}}</tool_call>', "<tool_call> x", [NOW]),
        ('<tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>', "<tool_call>", [NOW]),
        # Arguments that break off do not parse, and nothing is lost.
        ('<tool_call>{"name": "weather", "arguments": {"city": Paris}}</tool_call>', "Paris}}</tool_call>",
         [("weather", '{"city": ')]),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Par', "", [("weather", '{"city": "Par')]),
        ('<tool_call>{"name": "now", "arguments": {}} or so', "or so", [NOW]),
        ('<tool_call>{"name": "now", "arguments": {}, oh', ", oh", [NOW]),
    ],
    "llama": [
        ('{"name": "weather", "parameters": {"city": "Paris"}}', "", [W]),
        ('\n {"type": "function", "name": "weather", "parameters": {"city": "Paris"}}', "", [W]),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', "", [W]),
        ('{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}', "", [W, NOW]),
        ('I look. <|python_tag|>{"name": "now", "arguments": {}};{"name": "now", "parameters": {}}', "I look.", [NOW, NOW]),
        ('{"name": "now", "parameters": {}} is it', "is it", [NOW]),
        ('{"name": "now", "parameters": {}}; that', "; that", [NOW]),
        ('{"name": "now", "parameters": {}}\n', "", [NOW]),
        ('<|python_tag|>{"name": "other", "parameters": {}}', "", [("other", "{}")]),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        ('{"city": "Paris", "n": [1]}', '{"city": "Paris", "n": [1]}', []),
        ('See {"name": "now", "parameters": {}}', 'See {"name": "now", "parameters": {}}', []),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        (' <|python_tag|>a<|python_tag|>{"name": "now"}', " <|python_tag|>a", [NOW]),
        ("{", "{", []),
        (" { ", " { ", []),
    ],
    "mistral": [
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]', "", [W]),
        ('[TOOL_CALLS][{"name":"weather","arguments":{"city": "Paris"}, "id": "a"}, {"name":"now","arguments":{}}]', "",
         [W, NOW]),
        ('Yes. [TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]now{}', "Yes.", [W, NOW]),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', "", [W]),
        ('[TOOL_CALLS]weather[CALL_ID]aB3456789[ARGS]{"city": "Paris"}', "", [W]),
        ('[TOOL_CALLS]{"name": "now", "arguments": {}}', "", [NOW]),
        ('[TOOL_CALLS] [{"name": "now", "arguments": {}}, oops]', ", oops]", [NOW]),
        ('[TOOL_CALLS] [{"name": "now", "arguments": {}}', "", [NOW]),
        ("[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
        ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
        ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
        ("[TOOL", "[TOOL", []),
        ("see [1] and [TOOLS]", "see [1] and [TOOLS]", []),
        ('[TOOL_CALLS]now{"a": nope}', "nope}", [("now", '{"a": ')]),
    ],
    "pythonic": [
        ('[weather(city="Paris")]', "", [W]),
        ("[weather(city='Paris'), now()]", "", [W, NOW]),
        ("<|python_start|>[now()]<|python_end|>", "", [NOW]),
        ("[weather(city='it\\'s', days=-3, exact=True, more={'a': [1, None, 2.5], \"b\": (), 'c': false}, )]", "",
         [("weather", '{"city": "it\'s", "days": -3, "exact": true, "more": {"a": [1, null, 2.5], "b": [], "c": false}}')]),
        ("[weather(city='''a'b\n\"''', note=r'\\d', any='\\d\\n\\x41' 'b')]", "",
         [("weather", '{"city": "a\'b\\n\\"", "note": "\\\\d", "any": "\\\\d\\nAb"}')]),
        ("[weather(city='a, b) [c')] Well?", "Well?", [("weather", '{"city": "a, b) [c"}')]),
        ("[now(), other()]", ", other()]", [NOW]),
        ("[now()", "", [NOW]),
        ("[1] says so", "[1] says so", []),
        ("[other(a=1)]", "[other(a=1)]", []),
        ("[]", "[]", []),
        ("[now", "[now", []),
        ("Call [now()]", "Call [now()]", []),
        ("[weather(city=Paris)]", "city=Paris)]", [("weather", "{")]),
        ("[weather(days=1, 2)]", ", 2)]", [("weather", '{"days": 1')]),
        ("[weather('Paris')]", "'Paris')]", [("weather", "{")]),
        ("[weather(city='\\ud800')]", "city='\\ud800')]", [("weather", "{")]),
    ],
    "xml": [
        ("<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>", "", [W]),
        ("Now.\n<function=weather><parameter=city>Paris</parameter></function>", "Now.", [W]),
        ("<tool_call><function=now></function></tool_call>\n<tool_call><function=now></function></tool_call>", "", [NOW, NOW]),
        (
            "<tool_call><function=weather>\n<parameter=city>\nthree\n\nlines\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
            "<parameter=exact>\nTrue\n</parameter>\n<parameter=more>\n{\"a\": [1]}\n</parameter>\n<parameter=note>\nnull\n"
            "</parameter>\n<parameter=any>\n[1]\n</parameter>\n</function></tool_call>",
            "",
            [("weather", '{"city": "three\\n\\nlines", "days": 3, "exact": true, "more": {"a": [1]}, "note": null, '
              '"any": [1]}')],
        ),
        (
            "<function=weather><parameter=city>true</parameter><parameter=days>many</parameter>"
            "<parameter=note>5</parameter><parameter=any>NaN</parameter></function>",
            "",
            [("weather", '{"city": "true", "days": "many", "note": "5", "any": "NaN"}')],
        ),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ("<function=", "<function=", []),
        ("<tool_call><function=weather><parameter=city>Par", "<parameter=city>Par", [("weather", "{")]),
        ("<function=now>what</function>", "what</function>", [("now", "{")]),
    ],
}  # fmt: skip
CASES = [(name, *case) for name, cases in OUTPUTS.items() for case in cases]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_outputs(name: str, text: str, content: str, calls: list[Call]) -> None:
    whole = run(make(name), [text])

    assert outcome(whole) == (content, calls)
    assert run(make(name), list(text)) == whole
    for cut in range(1, len(text)):
        assert run(make(name), [text[:cut], text[cut:]]) == whole


def words(name: str) -> list[str]:
    """What outputs of a format are made of, and what belongs to none."""
    return [
        *{"hermes": ["<tool_call>", "</tool_call>"], "llama": ["<|python_tag|>", ";"],
          "mistral": ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "weather"],
          "pythonic": ["weather(", "now(", "city=", "'", "\\", "True"],
          "xml": ["<tool_call>", "<function=", "weather", "</function>", "<parameter=", "city", ">", "</parameter>"]}[name],
        *('{"name": "weather", ', '"arguments": ', '"parameters": ', "{", "}", "[", "]", ",", ":", '"', '"a"', "1", "-"),
        *("null", " ", "\n", "x", "é", "(", ")", "\\u00", '{"name": "now"}', '"arguments": {"a": [true]}}'),
    ]  # fmt: skip


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text_in_any_pieces(name: str, data: st.DataObject) -> None:
    pieces = data.draw(st.lists(st.sampled_from(words(name)), max_size=25))
    text = "".join(pieces)
    whole = run(make(name), [text])

    assert run(make(name), pieces) == whole
    assert run(make(name), list(text)) == whole
    content, calls = outcome(whole)
    if not calls:
        assert content == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WAYS = {
    "hermes": lambda texts: "\n".join(f'<tool_call>\n{{"name": "now", "arguments": {text}}}\n</tool_call>' for text in texts),
    "llama": lambda texts: "; ".join(f'{{"name": "now", "parameters": {text}}}' for text in texts),
    "mistral": lambda texts: "".join(f"[TOOL_CALLS]now{text}" for text in texts),
}


@pytest.mark.parametrize("name", WAYS)
@settings(max_examples=60, deadline=None)
@given(
    arguments=st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), min_size=1, max_size=3),
    ascii_=st.booleans(),
    size=st.integers(1, 9),
)
@example(arguments=[{"a": "</tool_call>;[TOOL_CALLS]"}], ascii_=False, size=3)
def test_arguments_are_passed_on_as_they_are(name: str, arguments: list[Any], ascii_: bool, size: int) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_) for value in arguments]
    text = WAYS[name](texts)

    content, calls = outcome(run(make(name), [text[at : at + size] for at in range(0, len(text), size)]))

    assert (content, calls) == ("", [("now", text) for text in texts])


@settings(max_examples=100, deadline=None)
@given(arguments=st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), JSON, max_size=3))
def test_python_literals_become_json(arguments: dict[str, Any]) -> None:
    text = f"[now({', '.join(f'{name}={value!r}' for name, value in arguments.items())})]"

    content, ((name, found),) = outcome(run(make("pythonic"), list(text)))

    assert (content, name, json.loads(found)) == ("", "now", arguments)


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, cases in OUTPUTS.items() for text, _, calls in cases if calls]
)
def test_the_first_call_alone(name: str, text: str) -> None:
    parser = make(name, max_calls=1)
    events = run(parser, list(text))
    _, calls = outcome(events)
    _, all_calls = outcome(run(make(name), [text]))

    assert calls == all_calls[:1]
    if parser.full:
        assert parser.push("more") == []


def test_arguments_grow_as_they_come() -> None:
    parser = make("hermes")

    assert parser.push('<tool_call>{"name": "weather", "arguments": ') == []
    assert parser.push("{") == [CallBegin(0, "weather"), Arguments(0, "{")]
    assert parser.push('"city": "Pa') == [Arguments(0, '"city": "Pa')]
    assert parser.push("ris") == [Arguments(0, "ris")]
    assert parser.push('"}}\n') == [Arguments(0, '"}')]


def test_content_is_held_back_no_longer_than_needed() -> None:
    assert make("hermes").push("Hello <") == [Content("Hello")]
    assert make("hermes").push("a < b") == [Content("a < b")]
    assert make("llama").push('{"answer"') == []
    assert make("llama").push('{"answer" 4') == [Content('{"answer" 4')]
    assert make("pythonic").push("[no") == []
    assert make("pythonic").push("[1") == [Content("[1")]


def test_a_long_output_takes_time_in_proportion() -> None:
    text = "<tool_call>" * 5000 + '{"name": "now", "arguments": {"a": "' + "x" * 50_000
    content, calls = outcome(run(make("hermes"), [text[at : at + 4] for at in range(0, len(text), 4)]))

    assert len(content) == 4999 * len("<tool_call>")
    assert len(calls[0][1]) == 50_000 + len('{"a": "')


@pytest.mark.parametrize(
    ("name", "begin"), [("xml", "<tool_call><function=weather><parameter=city>"), ("pythonic", '[weather(city="')]
)
def test_what_is_held_back_is_not_copied_at_each_token(name: str, begin: str) -> None:
    def seconds(before: str) -> float:
        """Of processor time for some tokens; the least of a few."""
        parser = make(name)
        assert [type(event) for event in parser.push(begin + before)] == [CallBegin, Arguments]
        found = []
        for _ in range(5):
            began = time.process_time()
            for _ in range(300):
                parser.push(" token")
            found.append(time.process_time() - began)
        return min(found)

    assert seconds("x" * 10**6) < 5 * seconds("x")
