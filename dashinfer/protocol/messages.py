"""The messages of a chat, as pydantic models: what each role may carry, and what of it a chat template gets to see.

Knows nothing of sampling or of HTTP.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from dashinfer.protocol.base import RequestModel
from dashinfer.protocol.media import ImagePart, ImageUrlPart, VideoPart, VideoUrlPart
from dashinfer.vision.request import MediumRequest

MAX_PARTS = 1024  # of one content
MAX_TOOL_CALLS = 128  # of one message


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


PART_KINDS = ("text", "image_url", "image", "video_url", "video")


def _part_kind(value: Any) -> str:
    """The tag of a part; what is none of ours is refused before pydantic looks for a part's fields."""
    if not isinstance(value, dict):
        raise PydanticCustomError("part_type", 'must be an object such as {"type": "text", "text": "..."}')
    kind = value.get("type")
    if kind not in PART_KINDS:
        if not isinstance(kind, str):
            raise PydanticCustomError("part_kind", "needs a `type`, which is one of {kinds}", {"kinds": ", ".join(PART_KINDS)})
        raise PydanticCustomError("unsupported", "content parts of type `{kind}` are not supported", {"kind": kind[:40]})
    return kind


def _supported_part(value: Any) -> Any:
    _part_kind(value)
    return value


Part = Annotated[
    TextPart | ImageUrlPart | ImagePart | VideoUrlPart | VideoPart,
    Field(discriminator="type"),
    BeforeValidator(_supported_part),
]


def _content_kind(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


# The tags appear in pydantic's error locations; `parse` takes them out.
CONTENT_TAGS = frozenset({"text", "parts"})

Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[Part],
        Field(min_length=1, max_length=MAX_PARTS),
        Field(fail_fast=True),
        Tag("parts"),
    ],
    Discriminator(_content_kind),
]


class FunctionCall(RequestModel):
    name: str
    arguments: str = Field(description="JSON text")
    parsed_arguments: Any = Field(default=None, exclude=True, description="ignored: a client's own")


class ToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = Field(default=None, exclude=True, description="ignored: of a stream's piece")


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
    reasoning: str | None = Field(default=None, description="another name of reasoning_content")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOL_CALLS), Field(fail_fast=True)] | None = None
    annotations: Any = Field(default=None, description="ignored")
    parsed: Any = Field(default=None, description="ignored: a client's own")
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
_HIDDEN = ("refusal", "annotations", "audio", "function_call", "parsed")


def template_message(message: Message) -> dict[str, Any]:
    """A plain dictionary for a chat template: the fields that were given, and `content` always. Of an image or a video, a
    template sees that it is there.

    Arguments of tool calls are JSON text in the API and objects in templates, so text that is an object is parsed.
    """
    plain = message.model_dump(exclude_none=True, exclude=set(_HIDDEN))
    plain.setdefault("content", None)
    if thought := plain.get("reasoning_content") or plain.get("reasoning"):
        plain["reasoning_content"] = plain["reasoning"] = thought
    if not plain.get("tool_calls", True):
        del plain["tool_calls"]  # templates ask whether it is there
    if isinstance(plain["content"], list):
        plain["content"] = [
            part if part["type"] == "text" else {"type": part["type"].removesuffix("_url")} for part in plain["content"]
        ]
    for call in plain.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"]["arguments"])
    return plain


def name_tool_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives messages of tools the name of the function that was called, which some templates show and clients leave out."""
    names: dict[str, str] = {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and "name" not in message and (name := names.get(message.get("tool_call_id", ""))):
            message["name"] = name
    return messages


def _arguments(text: str) -> Any:
    """What is no JSON, by the same rules as a body, stays text; so does an escaped half of a character, which nothing can
    encode."""
    try:
        parsed = _decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text


def has_media(message: Message) -> bool:
    return isinstance(message.content, list) and not all(isinstance(part, TextPart) for part in message.content)


def message_media(message: Message, place: str) -> list[MediumRequest]:
    """The images and videos of a message in their order. `place` is the message's own, for errors: `messages.0`."""
    if not isinstance(message.content, list):
        return []
    return [
        part.medium(f"{place}.content.{number}")
        for number, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    ]


def forget_media(message: Message) -> None:
    """Empties the URLs of a message's images and videos."""
    if isinstance(message.content, list):
        for part in message.content:
            if not isinstance(part, TextPart):
                part.forget()
