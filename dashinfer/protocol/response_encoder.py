"""The answers of `/v1/responses`: the events of a chat as items, whole or as typed events. Knows nothing of HTTP."""

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, Field

from dashinfer.errors import RequestError
from dashinfer.protocol.chat import ChoiceFinish
from dashinfer.protocol.responses import Item, ResponsesRequest
from dashinfer.protocol.stream import escape_line_ends
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning

_encode = msgspec.json.Encoder().encode


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


def usage_of(prompt_tokens: int, cached_tokens: int, output_tokens: int, reasoning_tokens: int) -> dict[str, Any]:
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
