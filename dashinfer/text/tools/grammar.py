"""`call_grammar`: how calls are written in each format, as a grammar in llguidance's Lark dialect.

What a grammar admits, the parser of its format reads back as calls whose arguments the functions' schemas admit.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dashinfer.guidance.spec import schema_term, text_term
from dashinfer.text.tools import hermes, llama, mistral, qwen_xml
from dashinfer.text.tools.qwen_xml import types_of

TokenId = Callable[[str], int | None]

_STRING_LIMITS = ("pattern", "format", "minLength", "maxLength")


@dataclass(frozen=True, slots=True)
class Function:
    """Attributes:
    schema: JSON Schema of the arguments, an object's.
    strict: what of the schema cannot be enforced is an error, rather than ignored.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool = False


@dataclass(frozen=True, slots=True)
class _Shape:
    """How an output with calls is put together: `trigger group (between trigger group)*`, with one item or, where there is a
    `comma`, several in a group."""

    word: str  # that begins calls; "" where calls stand for the whole output
    trigger: str  # its term
    before: str
    item: str
    comma: str
    after: str
    between: str | None  # None: there is one group
    first: str = ""  # without a trigger: the character that a call begins with, and no answer


def call_grammar(
    format: str,
    style: str,
    functions: Sequence[Function],
    *,
    required: bool,
    parallel: bool,
    token_id: TokenId,
    rule: str = "start",
) -> str:
    """Rules, of which the first is `rule`.

    Args:
        format, style: see `ToolFormat`.
        required: calls and nothing else; otherwise any text, in which whatever begins like a call is one.
        parallel: more than one call is allowed.
        token_id: of a text that is a token by itself, which a grammar names by its number.

    Raises:
        ValueError: a schema that the format has no way to enforce.
    """

    def marker(word: str) -> str:
        token = token_id(word)
        return text_term(word) if token is None else f"<[{token}]>"

    rules: list[str] = []
    names = []
    for i, function in enumerate(functions):
        names.append(f"call_{i}")
        if format == "pythonic":
            rules += _python_call(i, function)
        elif format == "qwen3_coder":
            rules += _xml_call(i, function)
        else:
            arguments = f"args_{i}"
            rules += [
                f"{arguments}: {_arguments(function)}",
                f"call_{i}: {_json_call(format, style, function, marker, arguments)}",
            ]
    rules.append(f"item: {' | '.join(names)}")
    first, *others = _whole(_shape(format, style, marker), required=required, parallel=parallel)
    return "\n".join([f"{rule}: {first}", *others, *rules, ""])


def _shape(format: str, style: str, marker: Callable[[str], str]) -> _Shape:
    if format == "hermes":
        return _Shape(hermes.OPEN, marker(hermes.OPEN), '"\\n"', "item", "", f'"\\n" {marker(hermes.CLOSE)}', '"\\n"')
    if format == "qwen3_coder":
        return _Shape(qwen_xml.OPEN, marker(qwen_xml.OPEN), '"\\n"', "item", "", f'"\\n" {marker(qwen_xml.CLOSE)}', '"\\n"')
    if format == "mistral" and style == "array":
        return _Shape(mistral.MARK, marker(mistral.MARK), '" "? "["', "item", '", "', '"]"', None)
    if format == "mistral":
        return _Shape(mistral.MARK, marker(mistral.MARK), "", "item", "", "", "")
    if format == "pythonic":
        return _Shape("", "", '"["', "item", '", "', '"]"', None, first="[")
    assert format in ("llama3_json", "json"), format
    tag = marker(llama.TAG)
    return _Shape("", "", f"{tag}?" if tag.startswith("<") else "", "item", '"; "', "", None, first="{")


def _whole(shape: _Shape, *, required: bool, parallel: bool) -> list[str]:
    """The right side of the first rule, and the rules that it needs."""
    items = f"{shape.item} ({shape.comma} {shape.item})*" if shape.comma and parallel else shape.item
    group = f"group: {shape.before} {items} {shape.after}"
    many = parallel and shape.between is not None
    if required:
        again = f" ({shape.between} {shape.trigger} group)*" if many else ""
        return [f"{shape.trigger} group{again}", group]
    if not shape.word:
        return ["(TEXT | group)?", rf"TEXT: /[^\{shape.first}](.|\n)*/", group]
    if shape.trigger.startswith("<"):  # spelled with other tokens, it would begin calls all the same
        head, text = "head", without_term(shape.word)
    else:
        head, text = "head[lazy]", r"/(.|\n)*/"
    start = "(head group)* tail" if many else "tail | head group"
    return [start, f"{head}: TEXT {shape.trigger}", "tail: TEXT", f"TEXT: {text}", group]


def _json_call(format: str, style: str, function: Function, marker: Callable[[str], str], arguments: str) -> str:
    name = text_term(function.name)
    if format == "mistral" and style != "array":
        call_id = f"{marker(mistral.CALL_ID)} /[a-zA-Z0-9]{{9}}/ " if style == "call_id" else ""
        return f"{name} {call_id}{marker(mistral.ARGS) if style != 'bare' else ''} {arguments}"
    key = "parameters" if format == "llama3_json" else "arguments"
    begin = text_term(f'{{"name": {name}, "{key}": ')
    return f'{begin} {arguments} "}}"'


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """An object's schema; one that names its properties, and says nothing of others, has no others."""
    closed = {**schema, "type": "object"}
    if (
        not {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf"}
        & schema.keys()
    ):
        closed.setdefault("properties", {})
        closed["additionalProperties"] = False
    return closed


def without_term(word: str) -> str:
    """A term for any text in which a word does not occur."""
    escaped = re.escape(word).replace("/", "\\/")
    return f"/(?s:.*)/ & ~/(?s:.*){escaped}(?s:.*)/"


def _term(function: Function, schema: Any) -> str:
    """On one line, as templates show models how calls are written."""
    return schema_term(schema, lenient=not function.strict, whitespace=" ")


def _arguments(function: Function) -> str:
    return _term(function, _closed(function.schema))


def _properties(function: Function) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it is required, of each argument.

    Raises:
        ValueError: the schema is more than a list of properties.
    """
    closed = _closed(function.schema)
    properties = closed.get("properties", {})
    if closed.get("additionalProperties") is not False or not isinstance(properties, Mapping):
        raise ValueError(f"the parameters of {function.name!r} are no plain object, as this model's format of calls needs them")
    required = closed.get("required", ())
    if not isinstance(required, list | tuple):
        raise ValueError(f"`required` in the parameters of {function.name!r} is no array")
    if not all(isinstance(schema, Mapping | bool) for schema in properties.values()):
        raise ValueError(f"a property in the parameters of {function.name!r} has no schema")
    shared = {key: closed[key] for key in ("$defs", "definitions") if key in closed}
    return [
        (name, {**schema, **shared} if isinstance(schema, Mapping) else schema, name in required)
        for name, schema in properties.items()
    ]


def _python_call(number: int, function: Function) -> list[str]:
    """A rule for each place between arguments, before the first one (`first_`) and after another (`more_`)."""
    properties = _properties(function)
    rules = [f'call_{number}: {text_term(function.name + "(")} first_{number}_0 ")"']
    for i, (name, schema, required) in enumerate(properties):
        key = f"{number}_{i}"
        rest = f"more_{number}_{i + 1}"
        rules.append(f"value_{key}: {_term(function, schema)}")
        for kind, comma in (("first", ""), ("more", ", ")):
            here = f"{text_term(f'{comma}{name}=')} value_{key} {rest}"
            without = "" if required else f" | {kind}_{number}_{i + 1}"
            rules.append(f"{kind}_{key}: {here}{without}")
    end = f"{number}_{len(properties)}"
    return [*rules, f'first_{end}: ""', f'more_{end}: ""']


def _xml_call(number: int, function: Function) -> list[str]:
    rules, names = [], []
    end = text_term(f"\n{qwen_xml.END_PARAMETER}\n")
    for i, (name, schema, required) in enumerate(_properties(function)):
        rule = f"parameter_{number}_{i}"
        value = f"value_{number}_{i}"
        names.append(rule if required else f"{rule}?")
        rules.append(f"{rule}: {text_term(f'{qwen_xml.PARAMETER}{name}>' + chr(10))} {value}")
        types = types_of(schema)
        values = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, Mapping) else None
        if types is None or "string" not in types:
            rules.append(f"{value}: {_term(function, schema)} {end}")
        elif values is not None and not isinstance(values, list):
            raise ValueError(f"the `enum` of {name!r} of {function.name!r} is no array")
        elif values is not None:
            texts = [text_term(item) for item in values if isinstance(item, str)]
            rules.append(f"{value}: ({' | '.join(texts)}) {end}")
        elif function.strict and any(limit in schema for limit in _STRING_LIMITS):
            raise ValueError(
                f"the text {name!r} of {function.name!r} has a limit that this model's format of calls cannot enforce"
            )
        else:
            rules.append(f"{value}[lazy]: /(.|\\n)*/ {end}")
    begin, close = text_term(f"{qwen_xml.FUNCTION}{function.name}>\n"), text_term(qwen_xml.END_FUNCTION)
    return [*rules, f"call_{number}: {begin} {' '.join(names)} {close}"]
