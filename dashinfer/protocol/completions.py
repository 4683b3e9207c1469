"""Requests and responses of `/v1/completions` as pydantic models, and the responses as bytes.

Knows nothing of how prompts become tokens, or of when to send what.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.protocol.chat import MAX_TOP_LOGPROBS, Usage
from dashinfer.protocol.constraints import ConstrainedRequest
from dashinfer.protocol.fields import SamplingFields
from dashinfer.protocol.stream import event
from dashinfer.types import FinishReason

MAX_PROMPTS = 2048  # OpenAI's, of embeddings
DEFAULT_MAX_TOKENS = 16  # OpenAI's

_encode = msgspec.json.Encoder().encode

Prompt = str | list[int]


def prompts(value: Any) -> Any:
    """Every form as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if not value:
            raise PydanticCustomError("too_short", "is empty")
        if _are_tokens(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("too_long", "has too many items", {"max_length": MAX_PROMPTS})
        if all(isinstance(item, str) for item in value) or all(isinstance(item, list) and _are_tokens(item) for item in value):
            return value
    raise PydanticCustomError("prompt", "must be a string, or an array of strings, of tokens or of arrays of tokens")


def _are_tokens(value: list[Any]) -> bool:
    return all(type(item) is int for item in value)


_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
PROMPTS_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1, "maxItems": MAX_PROMPTS},
    ]
}
Prompts = Annotated[list[Any], BeforeValidator(prompts), WithJsonSchema(PROMPTS_SCHEMA)]


class CompletionRequest(ConstrainedRequest, SamplingFields):
    """Text to go on with. A null stands for a field that is left out; an unknown field is refused."""

    prompt: Prompts = Field(description="text or tokens, or several of either, each of which has `n` choices")
    max_tokens: int = Field(default=DEFAULT_MAX_TOKENS, ge=0, description="most tokens of a choice; 0 goes with echo")
    echo: bool = Field(default=False, description="begin the text with the prompt, and log-probabilities with its tokens'")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="give log-probabilities, and those of as many likeliest tokens"
    )
    best_of: int | None = Field(default=None, description="must be n")
    suffix: Literal[""] | None = Field(default=None, description="not supported")
    add_special_tokens: bool = Field(default=True, description="those that the tokeniser puts around a text")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "CompletionRequest":
        self.check_fields()
        if self.best_of is not None and self.best_of != self.n:
            raise PydanticCustomError("at:best_of", "is not supported but as the value of `n`")
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("at:max_tokens", "is 0, which goes with `echo` only")
        return self

    @property
    def token_limit(self) -> int:
        return max(self.max_tokens, 1)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class CompletionLogprobs(BaseModel):
    """Parallel lists with an entry a token. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="natural logarithms; -9999.0 for a probability of zero")
    top_logprobs: list[dict[str, float] | None] = Field(description="the likeliest tokens, and the token itself")
    text_offset: list[int] = Field(description="where a token begins in the choice's text, in characters")


class CompletionChoice(BaseModel):
    index: int = Field(description="choice i of prompt p is p * n + i")
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None = Field(description="null but in a choice's last event")


class Completion(BaseModel):
    """The answer, and every event of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(description="Unix time in seconds")
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, description="of all prompts; in a stream as in that of a chat")


def choice(index: int, text: str, reason: FinishReason | None, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
    """A CompletionChoice."""
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class CompletionEncoder:
    """Completions of one request as JSON or as server-sent events; choices from `choice`, usage from `stream.usage`."""

    def __init__(self, *, id: str, created: int, model: str, system_fingerprint: str, include_usage: bool) -> None:
        self._head = {
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": system_fingerprint,
        }
        self._no_usage = {"usage": None} if include_usage else {}

    def body(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> bytes:
        return _encode({**self._head, "choices": choices, "usage": usage})

    def chunk(self, one: dict[str, Any]) -> bytes:
        return event({**self._head, "choices": [one], **self._no_usage})

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk, without choices."""
        return event({**self._head, "choices": [], "usage": usage})
