"""Responses to bytes: JSON bodies and server-sent events, built without pydantic.

A stream sends one small chunk a token, so a chunk is a prepared text around the escaped content. Tests hold everything here
to the models in `chat` and to the OpenAI client's types. Knows nothing of HTTP or of when to send what.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from dashinfer.errors import RequestError
from dashinfer.protocol.chat import ChoiceFinish
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning
from dashinfer.types import TokenLogprobs

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment: readers skip it

_encode = msgspec.json.Encoder().encode

# OpenAI's stand-in for the logarithm of zero, which JSON cannot write.
_LEAST_LOGPROB = -9999.0

# Line ends to some readers of event streams (Python's `str.splitlines`), so they are never sent as they are.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def _quote(text: str) -> bytes:
    """A JSON string. `text` has no lone surrogates: it was decoded from bytes."""
    quoted = _encode(text)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            if raw in quoted:
                quoted = quoted.replace(raw, escaped)
    return quoted


def _logprob(token: int, value: float, token_text: Callable[[int], tuple[str, list[int]]]) -> dict[str, Any]:
    text, raw = token_text(token)
    return {"token": text, "logprob": max(value, _LEAST_LOGPROB), "bytes": raw}


def logprob_entry(token: int, logprobs: TokenLogprobs, token_text: Callable[[int], tuple[str, list[int]]]) -> dict[str, Any]:
    """An item of `choices[].logprobs.content`. `token_text` is `Tokenizer.token_text`."""
    entry = _logprob(token, logprobs.chosen, token_text)
    pairs = zip(logprobs.top_tokens, logprobs.top_logprobs, strict=True)
    entry["top_logprobs"] = [_logprob(other, value, token_text) for other, value in pairs]
    return entry


def usage(
    prompt_tokens: int,
    completion_tokens: int,
    cached_tokens: int,
    media_tokens: Mapping[str, int] | None = None,
    reasoning_tokens: int | None = None,
) -> dict[str, Any]:
    """The `usage` object. `completion_tokens` counts all choices, `prompt_tokens` the prompt once, with what stands for images
    and videos in it; `media_tokens` is how many those are, `image_tokens` and `video_tokens`, for a model that sees, and
    `reasoning_tokens` how many of the completion's were thinking, for one that thinks."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens, **(media_tokens or {})},
    }
    if reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return counts


class ChunkEncoder:
    """Server-sent events of one streamed completion.

    Every method returns whole events, which may be joined into one write. `index` is the choice.
    """

    def __init__(self, *, id: str, created: int, model: str, system_fingerprint: str, include_usage: bool) -> None:
        head = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": system_fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._before_text: dict[int, bytes] = {}
        self._after_text = b'},"logprobs":null,"finish_reason":null}]' + self._tail

    def role(self, index: int) -> bytes:
        """The chunk that opens a choice."""
        return self._chunk(index, b'{"role":"assistant","content":""}', None, None)

    def content(self, index: int, text: str, logprobs: Sequence[dict[str, Any]] | None = None) -> bytes:
        """More text, with the entries of the tokens that arrived with it (which may be ones whose text is held back)."""
        if logprobs is not None:
            return self._chunk(index, b'{"content":' + _quote(text) + b"}", logprobs, None)
        before = self._before_text.get(index)
        if before is None:
            before = self._before_text[index] = b'%b,"choices":[{"index":%d,"delta":{"content":' % (self._head, index)
        return before + _quote(text) + self._after_text

    def event(
        self, index: int, event: Event, call_id: str | None = None, logprobs: Sequence[dict[str, Any]] | None = None
    ) -> bytes:
        """More of whatever it is. `call_id` is for the begin of a call, which holds no arguments yet."""
        match event:
            case Content(text):
                return self.content(index, text, logprobs)
            case Reasoning(text):
                quoted = _quote(text)
                delta = b'{"reasoning_content":%b,"reasoning":%b}' % (quoted, quoted)
            case CallBegin(number, name):
                delta = b'{"tool_calls":[{"index":%d,"id":%b,"type":"function","function":{"name":%b,"arguments":""}}]}' % (
                    number,
                    _quote(call_id or ""),
                    _quote(name),
                )
            case Arguments(number, text):
                delta = b'{"tool_calls":[{"index":%d,"function":{"arguments":%b}}]}' % (number, _quote(text))
        return self._chunk(index, delta, logprobs, None)

    def finish(self, index: int, reason: ChoiceFinish, logprobs: Sequence[dict[str, Any]] | None = None) -> bytes:
        """The chunk that ends a choice."""
        return self._chunk(index, b"{}", logprobs, reason)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk with empty `choices`, which comes last; only sent with `include_usage`."""
        return self._head + b',"choices":[],"usage":' + _encode(usage) + b"}\n\n"

    def _chunk(self, index: int, delta: bytes, logprobs: Sequence[dict[str, Any]] | None, reason: ChoiceFinish | None) -> bytes:
        return b'%b,"choices":[{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b' % (
            self._head,
            index,
            delta,
            _escape_line_ends(_encode(_logprobs(logprobs))),
            _encode(reason),
            self._tail,
        )


def _escape_line_ends(encoded: bytes) -> bytes:
    for raw, escaped in _LINE_ENDS:
        encoded = encoded.replace(raw, escaped)
    return encoded


def _logprobs(entries: Sequence[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": list(entries), "refusal": None}


def tool_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """An item of a message's `tool_calls`."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def choice(
    index: int,
    text: str,
    reason: ChoiceFinish,
    logprobs: Sequence[dict[str, Any]] | None = None,
    *,
    reasoning: str = "",
    tool_calls: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """An item of a completion's `choices`; `tool_calls` from `tool_call`."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if reasoning:
        message["reasoning_content"] = message["reasoning"] = reasoning
    if tool_calls:
        message["content"] = text or None
        message["tool_calls"] = list(tool_calls)
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(logprobs),
        "finish_reason": reason,
    }


def completion_body(
    *, id: str, created: int, model: str, system_fingerprint: str, choices: Sequence[dict[str, Any]], usage: dict[str, Any]
) -> bytes:
    """JSON of a ChatCompletion; `choices` from `choice`, `usage` from `usage`."""
    return _encode(
        {
            "id": id,
            "object": "chat.completion",
            "created": created,
            "model": model,
            "system_fingerprint": system_fingerprint,
            "choices": list(choices),
            "usage": usage,
        }
    )


def _model(model: str, created: int, max_length: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "dashinfer", "max_model_len": max_length}


def model_body(*, model: str, created: int, max_length: int) -> bytes:
    """JSON of a Model. `max_length` in tokens."""
    return _encode(_model(model, created, max_length))


def model_list_body(*, model: str, created: int, max_length: int) -> bytes:
    """JSON of a ModelList with the one model there is. `max_length` in tokens."""
    return _encode({"object": "list", "data": [_model(model, created, max_length)]})


def health_body(status: str, mode: str | None) -> bytes:
    """JSON of a Health."""
    return _encode({"status": status, "mode": mode})


def _error(error: RequestError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_body(error: RequestError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return _encode(_error(error))


def error_event(error: RequestError) -> bytes:
    """The same as a server-sent event, for a stream that fails after it began."""
    return event(_error(error))


def event(value: Any) -> bytes:
    """Anything that becomes JSON, as a server-sent event."""
    return b"data: " + _escape_line_ends(_encode(value)) + b"\n\n"
