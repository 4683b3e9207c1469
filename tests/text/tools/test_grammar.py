"""Whatever a grammar admits is read back as calls whose arguments their schemas admit. Outputs are drawn at random, byte by
byte, from what llguidance allows."""

import json
import random
from typing import Any

import jsonschema
import pytest

from dashinfer.text.tools.events import Arguments, CallBegin, Content
from dashinfer.text.tools.formats import TOOL_PARSERS, ToolFormat
from dashinfer.text.tools.grammar import Function, call_grammar

pytestmark = pytest.mark.feature("Tools", "Calls that validate")

llguidance = pytest.importorskip("llguidance")

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/unit"},
        "places": {"type": "array", "items": {"type": "number"}, "maxItems": 2},
        "exact": {"type": ["boolean", "null"]},
    },
    "required": ["city", "places"],
    "$defs": {"unit": {"enum": [1, 2]}},
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": WEATHER,
    "now": {},
    "sum": {"type": "object", "properties": {"a": {"type": "number"}}},
}
FUNCTIONS = [Function(name, schema, strict=True) for name, schema in SCHEMAS.items()]
FORMATS = [
    ToolFormat("hermes"), ToolFormat("llama3_json"), ToolFormat("mistral", "array"), ToolFormat("mistral", "bare"),
    ToolFormat("mistral", "args"), ToolFormat("mistral", "call_id"), ToolFormat("pythonic"), ToolFormat("qwen3_coder"),
]  # fmt: skip


class Drawing:
    """An output that is drawn under a grammar."""

    def __init__(self, grammar: str, seed: int) -> None:
        self.tokenizer = llguidance.LLTokenizer("byte")
        self.matcher = llguidance.LLMatcher(self.tokenizer, grammar)
        assert not self.matcher.is_error(), self.matcher.get_error()
        self.random = random.Random(seed)
        self.tokens: list[int] = []

    def force(self, text: str) -> None:
        for token in text.encode():
            assert self.allows(token), f"{text!r} is refused after {self.text!r}"
            self._take(token)

    def allows(self, token: int) -> bool:
        return bool(self.matcher.compute_logit_bias()[token])

    @property
    def text(self) -> str:
        return bytes(self.tokens).decode("utf-8", "replace")

    def draw(self, most: int = 3000) -> bool:
        """On to the end; False where it does not come within `most` bytes."""
        end = self.tokenizer.eos_token
        for _ in range(most):
            if self.matcher.is_stopped():
                return True
            bias = self.matcher.compute_logit_bias()
            # Mostly what makes no new string, list or digit, so that it ends.
            likely = [token for token in (end, *b'"}])\n<,') if bias[token]]
            allowed = [token for token in range(len(bias)) if bias[token] and token not in (*b" \n\t", 255)] or [
                token for token, allowed in enumerate(bias) if allowed
            ]
            token = self.random.choice(likely if likely and self.random.random() < 0.5 else allowed)
            if token == end:
                return True
            self._take(token)
        return False

    def _take(self, token: int) -> None:
        assert self.matcher.consume_token(token), self.matcher.get_error()
        self.tokens.append(token)


def grammar_of(format: ToolFormat, *, required: bool, parallel: bool = True, functions: list[Function] = FUNCTIONS) -> str:
    return call_grammar(format.name, format.style, functions, required=required, parallel=parallel, token_id=lambda _: None)


def read(format: ToolFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    parser = TOOL_PARSERS[format.name](SCHEMAS)
    content, calls = "", []
    for event in [*parser.push(text), *parser.finish()]:
        match event:
            case Content(more):
                content += more
            case CallBegin(_, name):
                calls.append((name, ""))
            case Arguments(_, more):
                calls[-1] = (calls[-1][0], calls[-1][1] + more)
    return content, calls


def check(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), {"type": "object", **SCHEMAS[name]})


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}-{format.style}")
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_validate(format: ToolFormat, parallel: bool) -> None:
    grammar = grammar_of(format, required=True, parallel=parallel)
    ended, names = 0, set()
    for seed in range(12):
        drawing = Drawing(grammar, seed)
        if not drawing.draw():
            continue
        ended += 1
        content, calls = read(format, drawing.text)
        assert content == "", drawing.text
        assert calls, drawing.text
        assert parallel or len(calls) == 1
        check(calls)
        names |= {name for name, _ in calls}

    assert ended >= 6
    assert len(names) >= 2


BEGINS = {
    "hermes": ['Well, <tool_call>\n{"name": "'],
    "llama3_json": ['{"name": "'],
    "mistral": ["Well, [TOOL_CALLS]"],
    "pythonic": ["["],
    "qwen3_coder": ["Well, <tool_call>\n<function="],
}


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.name}-{format.style}")
@pytest.mark.parametrize("parallel", [True, False])
def test_free_text_and_calls_that_validate(format: ToolFormat, parallel: bool) -> None:
    grammar = grammar_of(format, required=False, parallel=parallel)
    drawing = Drawing(grammar, 0)
    drawing.force("Any (text) <x> at {all}, [1].")
    assert drawing.allows(drawing.tokenizer.eos_token)

    drawing = Drawing(grammar, 1)
    drawing.force(BEGINS[format.name][0])
    assert not drawing.allows(ord("z"))
    assert drawing.draw()
    _, calls = read(format, drawing.text)
    assert calls, drawing.text
    check(calls)


def test_special_tokens_are_named_by_their_numbers() -> None:
    grammar = call_grammar(
        "hermes", "", FUNCTIONS, required=False, parallel=True, token_id=lambda text: 7 if text == "<tool_call>" else None
    )

    assert "<[7]>" in grammar
    assert '"<tool_call>"' not in grammar


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_schemas_that_a_format_cannot_enforce(name: str) -> None:
    function = Function("f", {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]})

    with pytest.raises(ValueError, match="no plain object"):
        grammar_of(ToolFormat(name), required=True, functions=[function])


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {}}, "required": 5},
        {"properties": {"a": 5}},
        {"properties": 5},
    ],
)
def test_what_is_no_schema_is_an_error_of_the_request(name: str, schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="parameters of 'f'"):
        call_grammar(name, "", [Function("f", schema)], required=True, parallel=True, token_id=lambda word: None)


def test_an_enum_that_is_no_array() -> None:
    schema = {"properties": {"a": {"type": "string", "enum": 5}}}
    with pytest.raises(ValueError, match="enum"):
        call_grammar("qwen3_coder", "", [Function("f", schema)], required=True, parallel=True, token_id=lambda word: None)
