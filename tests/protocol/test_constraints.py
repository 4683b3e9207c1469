"""The fields that say what an answer must look like, from the body to a constraint."""

from typing import Any

import msgspec
import pytest

from dashinfer.errors import InvalidRequest
from dashinfer.guidance.spec import Constraint
from dashinfer.protocol.parse import parse_chat_request

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def constraint(**fields: Any) -> Constraint | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return parse_chat_request(msgspec.json.encode(body)).constraint()


def formatted(kind: str, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": kind, **fields}}


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.feature("Structured output", "Regular expressions, choices, grammars")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        (formatted("text"), None),
        ({"structured_outputs": {}}, None),
        (formatted("json_object"), Constraint.json_object("response_format")),
        (
            formatted("json_schema", json_schema={"name": "n", "schema": SCHEMA, "strict": True, "description": None}),
            Constraint.from_schema(SCHEMA, "response_format.json_schema.schema"),
        ),
        (
            formatted("json_schema", json_schema={"name": "n", "schema": True}),
            Constraint.from_schema(True, "response_format.json_schema.schema", lenient=True),
        ),
        (
            formatted("json_schema", json_schema={"name": "n", "strict": True}),
            Constraint.json_object("response_format.json_schema.schema"),
        ),
        (formatted("regex", regex="a/b"), Constraint.from_regex("a/b", "response_format.regex")),
        (formatted("choice", choice=["a", ""]), Constraint.from_choice(["a", ""], "response_format.choice")),
        (formatted("grammar", grammar='start: "a"'), Constraint('start: "a"', "response_format.grammar")),
        ({"guided_json": SCHEMA}, Constraint.from_schema(SCHEMA, "guided_json")),
        ({"guided_json": '{"type": "null"}'}, Constraint.from_schema({"type": "null"}, "guided_json")),
        ({"guided_regex": "x"}, Constraint.from_regex("x", "guided_regex")),
        ({"guided_choice": ["x"]}, Constraint.from_choice(["x"], "guided_choice")),
        ({"guided_grammar": "g"}, Constraint("g", "guided_grammar")),
        ({"structured_outputs": {"json": SCHEMA}}, Constraint.from_schema(SCHEMA, "structured_outputs.json")),
        ({"structured_outputs": {"json_object": True}}, Constraint.json_object("structured_outputs.json_object")),
        ({"structured_outputs": {"choice": ["x"]}}, Constraint.from_choice(["x"], "structured_outputs.choice")),
    ],
)
def test_each_field_makes_its_constraint(fields: dict[str, Any], expected: Constraint | None) -> None:
    assert constraint(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be an object"),
        (formatted("xml"), "response_format.type", "must be"),
        ({"response_format": {}}, "response_format.type", "is required"),
        (formatted("text", schema={}), "response_format.schema", "not a field"),
        (formatted("json_schema"), "response_format.json_schema", 'is required with `type` "json_schema"'),
        (formatted("json_object", regex="x"), "response_format.regex", 'does not go with `type` "json_object"'),
        (formatted("json_schema", json_schema={"schema": {}}), "response_format.json_schema.name", "is required"),
        (formatted("json_schema", json_schema={"name": "a b"}), "response_format.json_schema.name", "letters, digits"),
        (formatted("json_schema", json_schema={"name": ""}), "response_format.json_schema.name", "letters, digits"),
        (
            formatted("json_schema", json_schema={"name": "a", "schema": []}),
            "response_format.json_schema.schema",
            "must be a JSON Schema: an object, true or false",
        ),
        (
            formatted("json_schema", json_schema={"name": "a", "json_schema": {}}),
            "response_format.json_schema.json_schema",
            "not a",
        ),
        (
            formatted("json_schema", json_schema={"name": "a", "strict": 1}),
            "response_format.json_schema.strict",
            "true or false",
        ),
        (formatted("choice", choice=[]), "response_format.choice", "must not be empty"),
        (formatted("choice", choice=["a", 1]), "response_format.choice.1", "must be a string"),
        (formatted("choice", choice=["a"] * 4097), "response_format.choice", "more than 4096"),
        ({"guided_json": "{"}, "guided_json", "is a string and no JSON"),
        ({"guided_regex": 1}, "guided_regex", "must be a string"),
        ({"guided_regex": "a", **formatted("json_object")}, "guided_regex", "excludes `response_format`"),
        (
            {"structured_outputs": {"regex": "a", "json": True}},
            "structured_outputs.regex",
            "excludes `structured_outputs.json`",
        ),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        constraint(**fields)

    assert error.value.param == param
    assert words in error.value.message
