"""Responses to bytes: JSON bodies and server-sent events, built without pydantic. Tests hold them to the models in `chat`."""

from collections.abc import Callable, Sequence
from typing import Any

from dashinfer.errors import RequestError
from dashinfer.types import FinishReason, TokenLogprobs

DONE: bytes  # b"data: [DONE]\n\n"


def logprob_entry(token: int, logprobs: TokenLogprobs, token_text: Callable[[int], tuple[str, list[int]]]) -> dict[str, Any]:
    """An item of `choices[].logprobs.content`. `token_text` is `Tokenizer.token_text`."""
    raise NotImplementedError


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    raise NotImplementedError


class ChunkEncoder:
    """Server-sent events of one streamed completion; every method returns whole events that may be joined into one write."""

    def __init__(self, *, id: str, created: int, model: str, system_fingerprint: str, include_usage: bool) -> None: ...

    def role(self, index: int) -> bytes:
        raise NotImplementedError

    def content(self, index: int, text: str, logprobs: Sequence[dict[str, Any]] | None = None) -> bytes:
        raise NotImplementedError

    def finish(self, index: int, reason: FinishReason, logprobs: Sequence[dict[str, Any]] | None = None) -> bytes:
        raise NotImplementedError

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The chunk with empty `choices`; only sent with `include_usage`."""
        raise NotImplementedError


def choice(index: int, text: str, reason: FinishReason, logprobs: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    raise NotImplementedError


def completion_body(
    *, id: str, created: int, model: str, system_fingerprint: str, choices: Sequence[dict[str, Any]], usage: dict[str, Any]
) -> bytes:
    """JSON of a ChatCompletion; `choices` from `choice`."""
    raise NotImplementedError


def model_list_body(*, model: str, created: int, max_length: int) -> bytes:
    raise NotImplementedError


def error_body(error: RequestError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    raise NotImplementedError


def error_event(error: RequestError) -> bytes:
    """The same as a server-sent event, for a stream that fails after it began."""
    raise NotImplementedError
