"""`parse_request`: bytes from the network to a model of a request, or one clear 400; `parse_chat_request` for a chat.

Owns the words of every validation error. Knows nothing of the model that is served.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError

from dashinfer.errors import InvalidRequest
from dashinfer.protocol.base import RequestModel
from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.protocol.media import URL_TAGS
from dashinfer.protocol.messages import CONTENT_TAGS, PART_KINDS, ROLES
from dashinfer.protocol.tools import CHOICE_TAGS

R = TypeVar("R", bound=RequestModel)

# Fields of OpenAI's API that change an answer and that this server does not know: never ignored.
UNSUPPORTED = frozenset({"functions", "function_call", "audio", "web_search_options"})

_LONE_SURROGATE = re.compile(rb"\\u[dD](?:[89aAbB]..(?!\\u[dD][c-fC-F])|[c-fC-F])")
_JSON_NAMES = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}
_WANTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
}
# Fields that take more than one type, by the last step of their path.
_WANTED_BY = {
    "stop": "a string or an array of strings",
    "content": "a string or an array of parts",
    "image_url": "a string or an object",
    "video_url": "a string or an object",
    "video": "a string or an array of strings",
}
_LONGEST_PARAM = 100  # characters; names of unknown fields come from the client
_SMALL_BODY = (
    8 << 20
)  # bytes; the memory that a body's items take is bounded by its size up to here, and by their number beyond
_MOST_ITEMS = 4 << 20
_decoder = msgspec.json.Decoder()


def parse_chat_request(body: bytes | bytearray) -> ChatCompletionRequest:
    """As `parse_request`, and tells fields of OpenAI's that are not supported from ones that nobody knows."""
    return parse_request(ChatCompletionRequest, body, refuse=_refuse_unsupported)


def parse_request(
    kind: type[R], body: bytes | bytearray, *, refuse: Callable[[Mapping[str, Any]], None] = lambda fields: None
) -> R:
    """The request in a body. `refuse` may raise for the fields before anything else looks at them.

    Raises:
        InvalidRequest: with `param` such as `temperature` or `messages.0.content`, and one line for people.
    """
    fields = _object(body)
    # A null is a field that was left out: clients write out their defaults so.
    fields = {name: value for name, value in fields.items() if value is not None}
    refuse(fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from None


def parse_query(kind: type[R], query: Mapping[str, str]) -> R:
    """The fields in a query string; of unknown ones nobody hears, as of a field's second value. Raises InvalidRequest."""
    known = {name: value for name, value in query.items() if name in kind.model_fields}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise invalid(error) from None


def _crowded(body: bytes | bytearray) -> bool:
    """Whether a large body is large for its number of items rather than for the media in it."""
    pieces = (body[start : start + _SMALL_BODY // 8] for start in range(0, len(body), _SMALL_BODY // 8))
    items = 0
    return any((items := items + sum(map(piece.count, (b",", b"[", b"{")))) > _MOST_ITEMS for piece in pieces)


def _object(body: bytes | bytearray) -> dict[str, Any]:
    if len(body) > _SMALL_BODY and _crowded(body):
        raise InvalidRequest(f"the body has more than {_MOST_ITEMS} items")
    try:
        value = _decoder.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not UTF-8") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error
    except msgspec.DecodeError as error:
        if not body.strip():
            raise InvalidRequest("the body is empty; send a JSON object") from error
        if _LONE_SURROGATE.search(body):
            raise InvalidRequest("the body has a string with half of a surrogate pair, which is no character") from error
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {_named(value)}")
    return value


def _unsupported(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="unsupported_parameter")


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    modalities = fields.get("modalities")
    if isinstance(modalities, list) and modalities != ["text"]:
        raise _unsupported('`modalities` other than ["text"] are not supported', "modalities")
    harmless = {"functions": ([],), "function_call": ("none", "auto")}
    for name in sorted(UNSUPPORTED & fields.keys()):
        if fields[name] not in harmless.get(name, ()):
            raise _unsupported(f"`{name}` is not supported", name)


def invalid(error: ValidationError) -> InvalidRequest:
    """The first of pydantic's errors in our words."""
    detail = error.errors(include_url=False, include_context=True)[0]
    kind: str = detail["type"]
    if kind.startswith("at:"):
        param = kind.removeprefix("at:")
        return InvalidRequest(f"`{param}` {detail['msg']}", param=param)
    location = detail["loc"]
    if kind == "unknown_field":
        location = (*location, detail["ctx"]["field"])
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        location = (*location, "role")
    param = _param(location)
    if kind == "unsupported":
        message = detail["msg"] if detail["msg"].startswith("content") else f"`{param}` {detail['msg']}"
        return _unsupported(message, param)
    return InvalidRequest(_sentence(kind, param, detail), param=param)


def _param(location: tuple[str | int, ...]) -> str:
    """`messages.0.content` from pydantic's path, which also names the branches of unions."""
    shown: list[str] = []
    for i, step in enumerate(location):
        before = location[i - 1] if i else None
        is_role = step in ROLES and isinstance(before, int) and i == 2
        is_content_kind = step in CONTENT_TAGS and before == "content"
        is_part_kind = step in PART_KINDS and isinstance(before, int) and i > 3
        is_url_kind = step in URL_TAGS and before in ("image_url", "video_url", "video")
        is_choice_kind = step in CHOICE_TAGS and before == "tool_choice"
        if not (is_role or is_content_kind or is_part_kind or is_url_kind or is_choice_kind or step == "[key]"):
            shown.append(str(step))
    param = ".".join(shown)
    param = param if len(param) <= _LONGEST_PARAM else param[:_LONGEST_PARAM] + "..."
    return param if param.isprintable() else repr(param)


def _sentence(kind: str, param: str, detail: Mapping[str, Any]) -> str:
    context: Mapping[str, Any] = detail.get("ctx") or {}
    value = detail["input"]
    if kind == "missing":
        return f"`{param}` is required"
    if kind in _WANTED:
        wanted = _WANTED_BY.get(param.rpartition(".")[2], _WANTED[kind])
        return f"`{param}` must be {wanted}, not {_shown(value)}"
    bounds = {
        "greater_than": ("more than", "gt"),
        "greater_than_equal": ("at least", "ge"),
        "less_than": ("less than", "lt"),
        "less_than_equal": ("at most", "le"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"`{param}` is {_shown(value)}; it must be {words} {_plain(context[key])}"
    if kind in ("too_short", "string_too_short"):
        return f"`{param}` must not be empty"
    if kind == "too_long":
        return f"`{param}` has more than {context['max_length']} items"
    if kind == "string_too_long":
        return f"`{param}` is longer than {context['max_length']} characters"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"`{param}` must be one of {', '.join(ROLES)}"
    if kind == "literal_error":
        return f"`{param}` must be {context['expected']}, not {_shown(value)}"
    return f"`{param}` {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _plain(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def _named(value: Any) -> str:
    return "null" if value is None else _JSON_NAMES[type(value)]


def _shown(value: Any) -> str:
    """A short value itself, and the kind of a long one: an error is one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float) and len(text := str(value)) <= 24:
        return text
    if isinstance(value, str) and len(value) <= 24 and value.isprintable():
        return f'the string "{value}"'
    return _named(value)
