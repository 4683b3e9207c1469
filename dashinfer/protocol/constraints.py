"""The fields of a request that say what an answer must look like, for every endpoint that generates.

`response_format` is OpenAI's, with three types more; `structured_outputs` and `guided_...` are vLLM's names for the same. Knows
how each becomes a `Constraint`, and nothing of whether that can be followed.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.errors import InvalidRequest
from dashinfer.guidance.spec import Constraint
from dashinfer.protocol.base import RequestModel

MAX_CHOICES = 4096
_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")


def _schema(value: Any) -> Any:
    if value is not None and not isinstance(value, dict | bool):
        raise PydanticCustomError("schema_type", "must be a JSON Schema: an object, true or false")
    return value


def _schema_or_text(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PydanticCustomError("schema_text", "is a string and no JSON") from None
    return _schema(value)


_KINDS = [{"type": "object"}, {"type": "boolean"}, {"type": "null"}]
Schema = Annotated[Any, BeforeValidator(_schema), WithJsonSchema({"anyOf": _KINDS})]
SchemaOrText = Annotated[
    Any,
    BeforeValidator(_schema_or_text),
    WithJsonSchema({"anyOf": [*_KINDS, {"type": "string"}]}),
]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


def _name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise PydanticCustomError("schema_name", "must be 1 to 64 letters, digits, underscores and hyphens")
    return value


class JsonSchemaFormat(RequestModel):
    name: Annotated[str, AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})]
    description: str | None = Field(default=None, description="ignored")
    json_schema: Schema = Field(default=None, alias="schema", description="default: any object")
    strict: bool | None = Field(default=None, description="refuse a schema that has what cannot be enforced")


class ResponseFormat(RequestModel):
    """What the answer is. The field with the name of the type is needed."""

    type: Literal["text", "json_object", "json_schema", "regex", "choice", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    regex: str | None = Field(default=None, description="that the whole answer matches; beyond OpenAI's")
    choice: Choices | None = Field(default=None, description="one of these texts; beyond OpenAI's")
    grammar: str | None = Field(default=None, description="in Lark or GBNF; beyond OpenAI's")

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> "ResponseFormat":
        for name in ("json_schema", "regex", "choice", "grammar"):
            if (getattr(self, name) is None) == (self.type == name):
                words = "is required with `type` {type}" if self.type == name else "does not go with `type` {type}"
                raise PydanticCustomError(f"at:response_format.{name}", words, {"type": json.dumps(self.type)})
        return self


class StructuredOutputs(RequestModel):
    """One of these."""

    json_: SchemaOrText = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class ConstrainedRequest(RequestModel):
    """A request whose answer may be constrained."""

    response_format: ResponseFormat | None = Field(default=None, description="what the answer is: text, JSON, of a schema, ...")

    # vLLM's
    structured_outputs: StructuredOutputs | None = Field(default=None, description="vLLM's name for what response_format says")
    guided_json: SchemaOrText = Field(default=None, description="vLLM's: a JSON Schema")
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _one_constraint(self) -> "ConstrainedRequest":
        given = self._constraints()
        if len(given) > 1:
            first, second = (given[place][0] for place in (0, 1))
            raise PydanticCustomError(f"at:{second}", "excludes `{first}`: an answer follows one of them", {"first": first})
        return self

    def constraint(self) -> Constraint | None:
        """What the answer must look like; None where it may be any text.

        Raises:
            InvalidRequest: a schema that JSON cannot write.
        """
        return next((_make(param, kind, value) for param, kind, value in self._constraints()), None)

    def _constraints(self) -> list[tuple[str, str, Any]]:
        """Field, kind and content of each that is given."""
        found: list[tuple[str, str, Any]] = []
        if (chosen := self.response_format) is not None:
            match chosen.type:
                case "json_object":
                    found.append(("response_format", "json", {"type": "object"}))
                case "json_schema":
                    form = chosen.json_schema
                    assert form is not None
                    schema = {"type": "object"} if form.json_schema is None else form.json_schema
                    found.append(("response_format.json_schema.schema", "json" if form.strict else "lenient", schema))
                case "regex" | "choice" | "grammar" as kind:
                    found.append((f"response_format.{kind}", kind, getattr(chosen, kind)))
        if (form := self.structured_outputs) is not None:
            if form.json_object:
                found.append(("structured_outputs.json_object", "json", {"type": "object"}))
            values = {"json": form.json_, "regex": form.regex, "choice": form.choice, "grammar": form.grammar}
            found += [(f"structured_outputs.{kind}", kind, value) for kind, value in values.items() if value is not None]
        names = ("json", "regex", "choice", "grammar")
        found += [(f"guided_{kind}", kind, value) for kind in names if (value := getattr(self, f"guided_{kind}")) is not None]
        return found


def _make(param: str, kind: str, value: Any) -> Constraint:
    match kind:
        case "regex":
            return Constraint.from_regex(value, param)
        case "choice":
            return Constraint.from_choice(value, param)
        case "grammar":
            return Constraint(value, param)
    try:
        return Constraint.from_schema(value, param, lenient=kind == "lenient")
    except (ValueError, RecursionError):
        raise InvalidRequest(f"`{param}` has a number that is not finite, or is nested too deeply", param=param) from None
