"""`/v1/responses`: its requests as chats, and the events of a chat as its items and typed events.

A conversation is a list of *items*, as the API has them; what a chat template needs is made of them here. Knows nothing of HTTP
and of where earlier responses are kept.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.errors import InvalidRequest, RequestError
from dashinfer.protocol.base import RequestModel, TextOrObjects
from dashinfer.protocol.chat import ChatCompletionRequest, ChoiceFinish
from dashinfer.protocol.parse import invalid
from dashinfer.protocol.stream import escape_line_ends
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning

Item = dict[str, Any]

MAX_ITEMS = 4096
MAX_METADATA = 16
MAX_METADATA_KEY, MAX_METADATA_VALUE = 64, 512  # characters
MAX_TOLD = 2**20  # bytes of a request in the background that every state of its response repeats
_DEEPER = 200  # levels that there must be room for: a response is encoded further down the stack than its request is read
_encode = msgspec.json.Encoder().encode


def encode_to_repeat(value: Any) -> bytes:
    """A part of a request as JSON. Raises InvalidRequest where it is nested too deeply to be encoded or decoded again."""
    for _ in range(_DEEPER):
        value = [value]
    try:
        return _encode(value)[_DEEPER:-_DEEPER]
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None


def _few(value: Any) -> Any:
    """Refused before pydantic makes an error of each."""
    if isinstance(value, dict) and len(value) > MAX_METADATA:
        raise PydanticCustomError("too_long", "has too many items", {"max_length": MAX_METADATA})
    texts = value.items() if isinstance(value, dict) else ()
    if any(len(key) > MAX_METADATA_KEY or (isinstance(text, str) and len(text) > MAX_METADATA_VALUE) for key, text in texts):
        raise PydanticCustomError(
            "at:metadata", f"has a key of more than {MAX_METADATA_KEY} characters, or a value of more than {MAX_METADATA_VALUE}"
        )
    return value


class ResponsesRequest(RequestModel):
    """A turn of a conversation. A null stands for a field that is left out; an unknown field is refused."""

    model: str = Field(min_length=1)
    input: TextOrObjects = Field(description="text, or items: messages, function_call, function_call_output, reasoning")
    instructions: str | None = Field(default=None, description="a system message of this turn alone")
    previous_response_id: str | None = Field(default=None, description="goes on from there, as long as it is kept")
    store: bool = Field(default=True, description="keep it in memory, for later turns")
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool = False
    background: bool = Field(default=False, description="go on when the connection is closed; needs store")
    tools: Annotated[list[Item], Field(fail_fast=True)] = Field(
        default_factory=list, max_length=128, description="of type function"
    )
    tool_choice: str | Item = Field(default="auto", description="auto, none, required, or a function")
    parallel_tool_calls: bool = True
    text: Item | None = Field(default=None, description="format: of type text, json_object or json_schema")
    reasoning: Item | None = Field(default=None, description="effort")
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] = Field(default_factory=dict, max_length=MAX_METADATA)

    conversation: None = Field(default=None, description="not supported; use previous_response_id")
    include: Any = Field(default=None, description="ignored")
    stream_options: Any = Field(default=None, description="ignored")
    truncation: Literal["disabled", "auto"] | None = Field(default=None, description="ignored: nothing is cut")
    user: str | None = Field(default=None, description="ignored")
    service_tier: str | None = Field(default=None, description="ignored")
    safety_identifier: str | None = Field(default=None, description="ignored")
    prompt_cache_key: str | None = Field(default=None, description="ignored: the prefix cache needs no key")
    prompt_cache_retention: str | None = Field(default=None, description="ignored")

    @model_validator(mode="after")
    def _what_goes_on_is_kept(self) -> "ResponsesRequest":
        if self.background and not self.store:
            raise PydanticCustomError("at:background", "needs `store`: nobody could ask for the response")
        return self

    def told(self) -> dict[str, Any]:
        """What every state of the response repeats."""
        return self.model_dump(
            include={
                *("instructions", "previous_response_id", "store", "max_output_tokens", "temperature", "top_p", "tools"),
                *("tool_choice", "parallel_tool_calls", "text", "reasoning", "metadata", "background"),
            }
        )

    def check_told(self) -> None:
        """Raises InvalidRequest where that is nested too deeply to be repeated, or too much to keep of a response that runs by
        itself."""
        size = len(encode_to_repeat(self.told()))
        if self.background and size > MAX_TOLD:
            raise InvalidRequest(
                f"the response would repeat {size} bytes of the request, beside its input; in the background {MAX_TOLD} may be",
                param="background",
            )

    def items(self) -> list[Item]:
        """What this turn adds."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def chat(self, history: Sequence[Item]) -> ChatCompletionRequest:
        """The same as a chat. `history`: items of earlier turns. Raises InvalidRequest."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        own = self.items()
        if len(history) + len(own) > MAX_ITEMS:
            raise InvalidRequest(f"the conversation has more than {MAX_ITEMS} items", param="input")
        for number, item in enumerate([*history, *own], -len(history)):
            _add(messages, item, f"input.{max(number, 0)}")
        for message in messages:
            if message["role"] == "assistant":
                message |= {name: "".join(message[name]) for name in ("content", "reasoning_content") if name in message}
        fields: dict[str, Any] = {"model": self.model, "messages": messages, "stream": self.stream}
        names = {"max_tokens": self.max_output_tokens, "temperature": self.temperature, "top_p": self.top_p}
        fields |= {name: value for name, value in names.items() if value is not None}
        if self.tools:
            fields["tools"] = [_tool(tool, number) for number, tool in enumerate(self.tools)]
            fields["tool_choice"] = _choice(self.tool_choice)
            fields["parallel_tool_calls"] = self.parallel_tool_calls
        elif self.tool_choice not in ("auto", "none"):
            raise InvalidRequest("`tool_choice` needs `tools`", param="tool_choice")
        fields |= _format((self.text or {}).get("format"))
        if (effort := (self.reasoning or {}).get("effort")) is not None:
            fields["reasoning_effort"] = effort
        try:
            return ChatCompletionRequest.model_validate(fields)
        except ValidationError as error:
            raise invalid(error) from None


def _add(messages: list[dict[str, Any]], item: Item, place: str) -> None:
    """Make an item part of the chat. What the assistant says, thinks and calls in a row is one message there, whose texts are
    lists of pieces."""
    kind = item.get("type", "message" if "role" in item else None)
    match kind:
        case "message":
            content = _content(item.get("content"), place)
            if item.get("role") == "assistant":
                _assistant(messages)["content"] += [content] if isinstance(content, str) else _plain(content, place)
            else:
                messages.append({"role": item.get("role"), "content": content})
        case "function_call":
            names = {name: _string(item, name, place) for name in ("call_id", "name", "arguments")}
            function = {"name": names["name"], "arguments": names["arguments"]}
            call = {"id": names["call_id"], "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        case "function_call_output":
            output = item.get("output")
            text = output if isinstance(output, str) else "".join(_plain(_content(output, place), place))
            messages.append({"role": "tool", "tool_call_id": _string(item, "call_id", place), "content": text})
        case "reasoning":
            parts = item.get("content") or []
            if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
                raise InvalidRequest(f"`{place}.content` must be an array of objects", param=f"{place}.content")
            thought = "".join(_string(part, "text", f"{place}.content") for part in parts if "text" in part)
            if thought:
                _assistant(messages).setdefault("reasoning_content", []).append(thought)
        case _:
            raise InvalidRequest(f"`{place}` has the type {str(kind)[:40]!r}, which is not supported", param=place)


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": []})
    return messages[-1]


def _content(content: Any, place: str) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"`{place}.content` must be a string or an array of parts", param=f"{place}.content")
    parts = []
    for number, part in enumerate(content):
        match part:
            case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
                parts.append({"type": "text", "text": text})
            case {"type": "input_image", "image_url": str(url)}:
                detail = {"detail": part["detail"]} if part.get("detail") is not None else {}
                parts.append({"type": "image_url", "image_url": {"url": url, **detail}})
            case _:
                where = f"{place}.content.{number}"
                raise InvalidRequest(f"`{where}` must be a part of type input_text, output_text or input_image", param=where)
    return parts


def _plain(parts: Any, place: str) -> list[str]:
    if not isinstance(parts, list) or any(part["type"] != "text" for part in parts):
        raise InvalidRequest(f"`{place}` may have text only", param=place)
    return [part["text"] for part in parts]


def _string(item: Item, name: str, place: str) -> str:
    if not isinstance(value := item.get(name), str):
        raise InvalidRequest(f"`{place}.{name}` must be a string", param=f"{place}.{name}")
    return value


def _tool(tool: Item, number: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise InvalidRequest(
            f"`tools.{number}` is not of type function; others are not supported",
            param=f"tools.{number}",
            code="unsupported_parameter",
        )
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _choice(choice: str | Item) -> Any:
    match choice:
        case "auto" | "none" | "required":
            return choice
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    raise InvalidRequest("`tool_choice` must be auto, none, required or a function", param="tool_choice")


def _format(form: Any) -> dict[str, Any]:
    match form:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"response_format": form}
        case {"type": "json_schema"}:
            schema = {name: form[name] for name in ("name", "schema", "strict", "description") if form.get(name) is not None}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
    raise InvalidRequest("`text.format` must be of type text, json_object or json_schema", param="text")


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = Field(description="always 0: the prefix cache is filled unasked")


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseObject(BaseModel):
    """A response; fields of the request that shaped it are told as they were given."""

    id: str
    object: Literal["response"]
    created_at: int
    background: bool
    status: Status
    model: str
    output: list[dict[str, Any]] = Field(description="items: reasoning, message, function_call")
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    usage: ResponseUsage | None


class ResponseEvent(BaseModel):
    """One event of a stream; `type` is the event's name, and the other fields are that type's."""

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(BaseModel):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def deleted_body(id: str) -> bytes:
    """JSON of a DeletedResponse."""
    return _encode({"id": id, "object": "response", "deleted": True})


_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}


def identified(items: Sequence[Item], new_id: Callable[[str], str]) -> list[Item]:
    """Items of a request as they are kept and told: with an id and a type each, and messages' contents as parts."""
    found = []
    for item in items:
        kind = item.get("type", "message")
        whole = {**item, "type": kind}
        if not isinstance(item.get("id"), str):
            whole["id"] = new_id(_PREFIXES.get(kind, "item_") if isinstance(kind, str) else "item_")
        if kind == "message" and isinstance(text := item.get("content"), str):
            said = item.get("role") == "assistant"
            part = {"type": "output_text", "text": text, "annotations": []} if said else {"type": "input_text", "text": text}
            whole["content"] = [part]
        found.append(whole)
    return found


class _Identified(msgspec.Struct):
    id: Any = None


_identify = msgspec.json.Decoder(_Identified).decode


class Page(RequestModel):
    """Which items of a list are wanted, from a query string."""

    model_config = ConfigDict(strict=False)

    after: str | None = Field(default=None, description="id of the item before the first one")
    limit: int = Field(default=20, ge=1, le=100)
    order: Literal["asc", "desc"] = Field(default="desc", description="desc: the last item first")
    include: Any = Field(default=None, description="ignored")

    def body(self, items: Sequence[msgspec.Raw]) -> bytes:
        """JSON of an ItemList. `items`: all, in order. Raises InvalidRequest: `after` is none of them."""
        ordered = list(items) if self.order == "asc" else list(reversed(items))
        ids = [_identify(item).id for item in ordered]
        start = 0
        if self.after is not None:
            if self.after not in ids:
                raise InvalidRequest(f"there is no item {self.after[:100]!r}", param="after")
            start = ids.index(self.after) + 1
        end = start + self.limit
        shown = ids[start:end]
        first, last = (shown[0], shown[-1]) if shown else (None, None)
        more = end < len(ordered)
        return _encode({"object": "list", "data": ordered[start:end], "first_id": first, "last_id": last, "has_more": more})


class StreamQuery(RequestModel):
    """Whether, and from where on, the events of a response are wanted, from a query string."""

    model_config = ConfigDict(strict=False)

    stream: bool = False
    starting_after: int | None = Field(
        default=None, ge=0, lt=2**31, description="number of the last event that is not wanted; default: all are"
    )
    include: Any = Field(default=None, description="ignored")
    include_obfuscation: Any = Field(default=None, description="ignored: nothing is added")

    @model_validator(mode="after")
    def _stream_fits(self) -> "StreamQuery":
        if self.starting_after is not None and not self.stream:
            raise PydanticCustomError("at:starting_after", "needs `stream`")
        return self


def usage(prompt_tokens: int, cached_tokens: int, output_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
    """A ResponseUsage."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
        "output_tokens": output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": prompt_tokens + output_tokens,
    }


class ResponseEncoder:
    """One response as JSON or as server-sent events.

    Attributes:
        output: the items so far.
    """

    def __init__(self, request: ResponsesRequest, *, id: str, created: int, model: str, new_id: Callable[[str], str]) -> None:
        """`new_id`: an id that begins with what it is given."""
        self._head = {"id": id, "object": "response", "created_at": created, "model": model, **request.told()}
        self._items: list[Item] = []
        self._new_id = new_id
        self._open: Item | None = None
        self._pieces: list[str] = []  # of the open item's text that are not in it yet
        self._sequence = 0

    @property
    def output(self) -> list[Item]:
        self._settle()
        return self._items

    def _response(self, status: Status, usage: dict[str, Any] | None = None, error: RequestError | None = None) -> Item:
        """A ResponseObject."""
        return {
            **self._head,
            "status": status,
            "output": self.output,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": usage,
        }

    def body(self, status: Status, usage: dict[str, Any] | None = None, error: RequestError | None = None) -> bytes:
        """JSON of a ResponseObject."""
        return _encode(self._response(status, usage, error))

    def start(self) -> bytes:
        """The first events, where an answer begins at once."""
        return self._event("response.created", response=self._response("in_progress")) + self.begun()

    def queued(self) -> bytes:
        """The first events, where `begun` follows later."""
        response = self._response("queued")
        return self._event("response.created", response=response) + self._event("response.queued", response=response)

    def begun(self) -> bytes:
        return self._event("response.in_progress", response=self._response("in_progress"))

    def add(self, event: Event, call_id: str | None) -> bytes:
        """What an event becomes. `call_id`: of a call that begins."""
        match event:
            case CallBegin(_, name):
                item = {"id": self._new_id("fc_"), "type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
                return self._begin(item)
            case Arguments(_, text):
                self._pieces.append(text)
                return self._event("response.function_call_arguments.delta", **self._where(), delta=text)
            case Content(text):
                return self._text("message", "output_text", text)
            case Reasoning(text):
                return self._text("reasoning", "reasoning_text", text)
        raise AssertionError(event)

    def end(self, status: Status, usage: dict[str, Any] | None = None, error: RequestError | None = None) -> bytes:
        """The last events; an item that was cut off says so."""
        closed = self._close("completed" if status == "completed" else "incomplete")
        return closed + self._event(f"response.{status}", response=self._response(status, usage, error))

    def _opened(self) -> Item:
        assert self._open is not None
        return self._open

    def _text(self, kind: str, part: str, text: str) -> bytes:
        before = b""
        if self._open is None or self._open["type"] != kind:
            before = self._begin(
                {"id": self._new_id("msg_"), "type": "message", "role": "assistant"}
                if kind == "message"
                else {"id": self._new_id("rs_"), "type": "reasoning", "summary": []},
                content=[],
            )
            shown = {"type": part, "text": "", **({"annotations": [], "logprobs": []} if kind == "message" else {})}
            self._opened()["content"].append(shown)
            before += self._event("response.content_part.added", **self._where(), content_index=0, part=dict(shown))
        self._pieces.append(text)
        more = {"logprobs": []} if kind == "message" else {}
        return before + self._event(f"response.{part}.delta", **self._where(), content_index=0, delta=text, **more)

    def _settle(self) -> None:
        """Put the pieces into their item; at each token it would be copied as often."""
        if self._open is not None and self._pieces:
            holder, name = self._open, "arguments"
            if self._open["type"] != "function_call":
                holder, name = self._open["content"][0], "text"
            holder[name] = "".join([holder[name], *self._pieces])
        self._pieces.clear()

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._opened()["id"], "output_index": len(self._items) - 1}

    def _begin(self, item: Item, **more: Any) -> bytes:
        closed = self._close("completed")
        self._open = {**item, **more, "status": "in_progress"}
        self._items.append(self._open)
        return closed + self._event("response.output_item.added", output_index=len(self._items) - 1, item=dict(self._open))

    def _close(self, status: str) -> bytes:
        if self._open is None:
            return b""
        self._settle()
        item, where = self._open, self._where()
        item["status"] = status
        events = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._event("response.function_call_arguments.done", **where, **done))
        else:
            part = item["content"][0]
            more = {"logprobs": []} if item["type"] == "message" else {}
            events.append(self._event(f"response.{part['type']}.done", **where, content_index=0, text=part["text"], **more))
            events.append(self._event("response.content_part.done", **where, content_index=0, part=part))
        events.append(self._event("response.output_item.done", output_index=where["output_index"], item=item))
        self._open = None
        return b"".join(events)

    def _event(self, type: str, /, **fields: Any) -> bytes:
        number, self._sequence = self._sequence, self._sequence + 1
        body = escape_line_ends(_encode({"type": type, "sequence_number": number, **fields}))
        return b"event: %b\ndata: %b\n\n" % (type.encode(), body)


def status_of(finish: ChoiceFinish) -> Status:
    return "incomplete" if finish == "length" else "completed"
