"""The messages of a chat, as pydantic models: what each role may carry, and what of it a chat template gets to see.

Knows nothing of sampling or of HTTP.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_PARTS = 1024  # of one content
MAX_TOOL_CALLS = 128  # of one message


class RequestModel(BaseModel):
    """Base of what clients send: JSON types exactly, and no field we don't know."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, value: Any) -> Any:
        """One error for the first unknown field: pydantic would make one for each of a million."""
        if isinstance(value, dict):
            for name in value:
                if name not in cls.model_fields:
                    raise PydanticCustomError("unknown_field", "is not a field this server knows", {"field": name})
        return value


def _supported_part(value: Any) -> Any:
    """Refuse what is no text before pydantic looks for the fields of a text part."""
    if not isinstance(value, dict):
        raise PydanticCustomError("part_type", 'must be an object such as {"type": "text", "text": "..."}')
    kind = value.get("type")
    if kind != "text":
        if not isinstance(kind, str):
            raise PydanticCustomError("part_kind", "needs a `type`; this model takes parts of type `text`")
        raise PydanticCustomError("unsupported", "content parts of type `{kind}` are not supported", {"kind": kind[:40]})
    return value


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


def _content_kind(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


# The tags appear in pydantic's error locations; `parse` takes them out.
CONTENT_TAGS = frozenset({"text", "parts"})

Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[Annotated[TextPart, BeforeValidator(_supported_part)]],
        Field(min_length=1, max_length=MAX_PARTS),
        Field(fail_fast=True),
        Tag("parts"),
    ],
    Discriminator(_content_kind),
]


class FunctionCall(RequestModel):
    name: str
    arguments: str = Field(description="JSON text")


class ToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(RequestModel):
    role: Literal["system"]
    content: Content
    name: str | None = None


class DeveloperMessage(RequestModel):
    role: Literal["developer"]
    content: Content
    name: str | None = None


class UserMessage(RequestModel):
    role: Literal["user"]
    content: Content
    name: str | None = None


def _must_be_null(value: Any) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported")


Unsupported = Annotated[None, BeforeValidator(_must_be_null)]


class AssistantMessage(RequestModel):
    """What a model said before. Clients send back the messages they got, so null fields of a response are taken."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = Field(default=None, description="what the model thought, for templates that show it")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS), Field(fail_fast=True)] | None = None
    annotations: Any = Field(default=None, description="ignored")
    audio: Unsupported = None
    function_call: Unsupported = None


class ToolMessage(RequestModel):
    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None
    name: str | None = None


Message = Annotated[
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]
ROLES = ("system", "developer", "user", "assistant", "tool")

_decode = msgspec.json.Decoder().decode
_HIDDEN = ("refusal", "annotations", "audio", "function_call")


def template_message(message: Message) -> dict[str, Any]:
    """A plain dictionary for a chat template: the fields that were given, and `content` always.

    Arguments of tool calls are JSON text in the API and objects in templates, so text that is an object is parsed.
    """
    plain = message.model_dump(exclude_none=True, exclude=set(_HIDDEN))
    plain.setdefault("content", None)
    for call in plain.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return plain


def _arguments(text: str) -> Any:
    """What is no JSON, by the same rules as a body, stays text; so does an escaped half of a character, which nothing can
    encode."""
    try:
        parsed = _decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text
