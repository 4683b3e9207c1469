"""`/v1/messages`, Anthropic's API: its requests as chats of ours, and the events of a chat as its responses.

A request is validated twice: its own fields here, what the model is asked then as the `ChatCompletionRequest` it becomes. Knows
nothing of HTTP or of when to send what.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.errors import InvalidRequest, RequestError
from dashinfer.protocol.base import RequestModel, TextOrObjects
from dashinfer.protocol.chat import MAX_MESSAGES, ChatCompletionRequest, ChoiceFinish
from dashinfer.protocol.constraints import Schema
from dashinfer.protocol.parse import invalid
from dashinfer.protocol.stream import escape_line_ends
from dashinfer.protocol.tools import MAX_TOOLS
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning

Block = dict[str, Any]

PING = b'event: ping\ndata: {"type":"ping"}\n\n'  # in long silences

_encode = msgspec.json.Encoder().encode
_MAX_STOP = 16


class InputMessage(RequestModel):
    role: Literal["user", "assistant"]
    content: TextOrObjects = Field(description="text, or blocks: text, image, tool_use, tool_result, thinking")


class ToolDefinition(RequestModel):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = Field(default=None, description="ignored: the prefix cache needs no marks")


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    json_schema: Schema = Field(alias="schema", description="a keyword that cannot be enforced is refused")


class OutputConfig(RequestModel):
    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="a chat's reasoning_effort"
    )


class CountTokensRequest(RequestModel):
    """What a prompt is made of."""

    model: str = Field(min_length=1)
    messages: Annotated[list[InputMessage], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: TextOrObjects | None = Field(default=None, description="text, or blocks of text")
    tools: Annotated[list[ToolDefinition], Field(fail_fast=True)] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: dict[str, Any] | None = Field(default=None, description="type: auto, any, tool (with name) or none")
    thinking: dict[str, Any] | None = Field(default=None, description="type: enabled (with budget_tokens) or disabled")
    output_config: OutputConfig | None = Field(default=None, description="what the answer is, and how much is thought")
    output_format: OutputFormat | None = Field(default=None, description="older name of output_config.format")
    cache_control: Any = Field(default=None, description="ignored: the prefix cache needs no marks")

    @model_validator(mode="after")
    def _one_format(self) -> "CountTokensRequest":
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise PydanticCustomError("at:output_format", "excludes `output_config.format`, its newer name")
        return self

    def chat(self) -> ChatCompletionRequest:
        """The same as a chat. Raises InvalidRequest."""
        return _chat(self, {})


class MessagesRequest(CountTokensRequest):
    """A chat in Anthropic's shape. A last message of the assistant is gone on with."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = Field(default=None, max_length=_MAX_STOP)
    stream: bool = False
    metadata: Any = Field(default=None, description="ignored")
    service_tier: str | None = Field(default=None, description="ignored")

    @model_validator(mode="after")
    def _thinking_fits(self) -> "MessagesRequest":
        budget = (self.thinking or {}).get("budget_tokens")
        if isinstance(budget, int) and budget >= self.max_tokens:
            raise PydanticCustomError("at:thinking", "has `budget_tokens` that are not less than `max_tokens`")
        return self

    def chat(self) -> ChatCompletionRequest:
        names = ("max_tokens", "temperature", "top_p", "top_k", "stream")
        fields = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.stop_sequences:
            fields["stop"] = self.stop_sequences
        return _chat(self, fields)


def _chat(request: CountTokensRequest, fields: dict[str, Any]) -> ChatCompletionRequest:
    messages = [*_system(request.system)]
    for number, message in enumerate(request.messages):
        messages += _messages(message, f"messages.{number}.content")
    fields |= {"model": request.model, "messages": messages}
    if messages[-1]["role"] == "assistant":
        fields["continue_final_message"] = True
    if request.tools:
        fields["tools"] = [_tool(tool) for tool in request.tools]
    if request.tool_choice is not None:
        fields |= _choice(request.tool_choice)
    if (thinking := request.thinking) is not None:
        if thinking.get("type") not in ("enabled", "disabled", "adaptive"):
            raise InvalidRequest("`thinking.type` must be enabled, adaptive or disabled", param="thinking")
        if thinking["type"] == "disabled":
            fields["reasoning_effort"] = "none"
        elif isinstance(budget := thinking.get("budget_tokens"), int):
            fields["max_thinking_tokens"] = budget
    config = request.output_config or OutputConfig()
    if config.effort is not None and "reasoning_effort" not in fields:
        fields["reasoning_effort"] = config.effort
    if (form := config.format or request.output_format) is not None:
        schema = {"name": "answer", "schema": form.json_schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from None


def in_our_words(error: InvalidRequest) -> None:
    """Give a refusal of the chat that a request became the name that its field has here."""
    error.message = error.message.replace("response_format.json_schema.schema", "output_config.format.schema")


def _system(system: str | list[Block] | None) -> Iterator[dict[str, Any]]:
    text = system if isinstance(system, str) else "\n".join(_texts(system or [], "system"))
    if text:
        yield {"role": "system", "content": text}


def _texts(blocks: Sequence[Any], param: str) -> list[str]:
    for number, block in enumerate(blocks):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise InvalidRequest(f"`{param}.{number}` must be a block of type text", param=f"{param}.{number}")
    return [block["text"] for block in blocks]


def _messages(message: InputMessage, param: str) -> list[dict[str, Any]]:
    """One message as those that a chat has for it: results of tools are messages of their own there."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    parts: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for number, block in enumerate(message.content):
        place = f"{param}.{number}"
        match message.role, block.get("type"):
            case _, "text":
                parts += [{"type": "text", "text": text} for text in _texts([block], param)]
            case "user", "image":
                parts.append(_image(block, place))
            case "user", "tool_result":
                results.append(
                    {"role": "tool", "tool_call_id": _text(block, "tool_use_id", place), "content": _result(block, place)}
                )
            case "assistant", "tool_use":
                function = {"name": _text(block, "name", place), "arguments": _arguments(block)}
                calls.append({"id": _text(block, "id", place), "type": "function", "function": function})
            case "assistant", "thinking":
                thoughts.append(_text(block, "thinking", place))
            case "assistant", "redacted_thinking":
                pass
            case _, kind:
                raise InvalidRequest(
                    f"`{place}` has the type {str(kind)[:40]!r}, which is not supported in a message of the {message.role}",
                    param=place,
                    code="unsupported_parameter",
                )
    if message.role == "user":
        return [*results, {"role": "user", "content": parts}] if parts or not results else results
    whole: dict[str, Any] = {"role": "assistant", "content": "".join(part["text"] for part in parts)}
    if thoughts:
        whole["reasoning_content"] = "".join(thoughts)
    if calls:
        whole["tool_calls"] = calls
    return [whole]


def _arguments(block: Block) -> str:
    try:
        return _encode(block.get("input", {})).decode()
    except RecursionError:  # it is read with more room on the stack
        raise InvalidRequest("the body is nested too deeply") from None


def _text(block: Block, name: str, place: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"`{place}.{name}` must be a string", param=f"{place}.{name}")
    return value


def _image(block: Block, place: str) -> dict[str, Any]:
    match block.get("source"):
        case {"type": "base64", "media_type": str(media_type), "data": str(data)}:
            return {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,{data}"}}
        case {"type": "url", "url": str(url)}:
            return {"type": "image_url", "image_url": {"url": url}}
    raise InvalidRequest(f"`{place}.source` must be of type base64 or url, with its fields", param=f"{place}.source")


def _result(block: Block, place: str) -> str:
    content = block.get("content", "")
    text = (
        content if isinstance(content, str) else "\n".join(_texts(content if isinstance(content, list) else [content], place))
    )
    return f"Error: {text}" if block.get("is_error") is True else text


def _tool(tool: ToolDefinition) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if choice.get("disable_parallel_tool_use") is True:
        fields["parallel_tool_calls"] = False
    match choice:
        case {"type": "auto" | "none" as word}:
            return fields | {"tool_choice": word}
        case {"type": "any"}:
            return fields | {"tool_choice": "required"}
        case {"type": "tool", "name": str(name)}:
            return fields | {"tool_choice": {"type": "function", "function": {"name": name}}}
    raise InvalidRequest("`tool_choice` must have the `type` auto, any, none, or tool with a `name`", param="tool_choice")


class MessagesUsage(BaseModel):
    input_tokens: int = Field(description="tokens of the prompt that were not in the prefix cache")
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessagesResponse(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]] = Field(description="blocks: thinking, text, tool_use")
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessagesUsage


class MessagesEvent(BaseModel):
    """One event of a stream; `type` is the event's name, and the other fields are that type's."""

    type: Literal[
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


class TokenCount(BaseModel):
    input_tokens: int


class AnthropicErrorDetail(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


_ERROR_TYPES = {
    401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip


def _error(error: RequestError, request_id: str) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id}


def error_body(error: RequestError, request_id: str) -> bytes:
    """JSON of an AnthropicError."""
    return _encode(_error(error, request_id))


def token_count_body(tokens: int) -> bytes:
    """JSON of a TokenCount."""
    return _encode({"input_tokens": tokens})


def usage(prompt_tokens: int, cached_tokens: int, output_tokens: int) -> dict[str, int]:
    """A MessagesUsage."""
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def stop_reason(finish: ChoiceFinish, stop_sequence: str | None) -> str:
    if stop_sequence is not None:
        return "stop_sequence"
    return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[finish]


_TEXT_OF = {"text": "text", "thinking": "thinking", "tool_use": "json"}  # where a block's text is


class MessageEncoder:
    """One answer as JSON or as server-sent events.

    Blocks follow the order of what the model wrote. Every method that encodes returns whole events.
    """

    def __init__(self, *, id: str, model: str) -> None:
        self._head = {"id": id, "type": "message", "role": "assistant", "model": model}
        self._blocks: list[Block] = []
        self._open: Block | None = None
        self._pieces: list[str] = []  # of the open block's text that are not in it yet

    def message(self, stop_reason: str | None, stop_sequence: str | None, usage: dict[str, int]) -> dict[str, Any]:
        """A MessagesResponse of the blocks so far."""
        self._settle()
        blocks = [_finished(block) for block in self._blocks]
        return {**self._head, "content": blocks, "stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage}

    def body(self, stop_reason: str, stop_sequence: str | None, usage: dict[str, int]) -> bytes:
        return _encode(self.message(stop_reason, stop_sequence, usage))

    def start(self, usage: dict[str, int]) -> bytes:
        return _event("message_start", message={**self.message(None, None, usage), "content": []})

    def add(self, event: Event, call_id: str | None) -> bytes:
        """What an event becomes. `call_id`: of a call that begins."""
        match event:
            case CallBegin(_, name):
                return self._begin({"type": "tool_use", "id": call_id, "name": name, "input": {}}, "json")
            case Arguments(_, text):
                assert self._open is not None, "arguments follow the call's begin"
                self._pieces.append(text)
                return self._delta({"type": "input_json_delta", "partial_json": text})
            case Content(text):
                before = b"" if self._is_open("text") else self._begin({"type": "text", "text": ""})
                self._pieces.append(text)
                return before + self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                block = {"type": "thinking", "thinking": "", "signature": ""}
                before = b"" if self._is_open("thinking") else self._begin(block)
                self._pieces.append(text)
                return before + self._delta({"type": "thinking_delta", "thinking": text})
        raise AssertionError(event)

    def end(self, stop_reason: str, stop_sequence: str | None, usage: dict[str, int]) -> bytes:
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return self._close() + _event("message_delta", delta=delta, usage=usage) + _event("message_stop")

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _settle(self) -> None:
        """Put the pieces into their block; at each token it would be copied as often."""
        if self._open is not None and self._pieces:
            name = _TEXT_OF[self._open["type"]]
            self._open[name] = "".join([self._open[name], *self._pieces])
        self._pieces.clear()

    def _begin(self, block: Block, *hidden: str) -> bytes:
        closed = self._close()
        self._open = {**block, **dict.fromkeys(hidden, "")}
        self._blocks.append(self._open)
        return closed + _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._settle()
        self._open = None
        return _event("content_block_stop", index=len(self._blocks) - 1)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)


def _finished(block: Block) -> Block:
    """A call's arguments as the object that they are; what was cut off is none."""
    if block["type"] != "tool_use":
        return block
    shown = {name: value for name, value in block.items() if name != "json"}
    try:
        parsed = msgspec.json.decode(block["json"])
    except (msgspec.DecodeError, RecursionError):
        return shown
    return {**shown, "input": parsed} if isinstance(parsed, dict) else shown


def error_event(error: RequestError, request_id: str) -> bytes:
    """For a stream that fails after it began."""
    return _event(**_error(error, request_id))


def _event(type: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (type.encode(), escape_line_ends(_encode({"type": type, **fields})))
