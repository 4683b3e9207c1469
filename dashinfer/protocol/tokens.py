"""Requests and responses of `/tokenize` and `/detokenize` as pydantic models, and the responses as bytes.

The shapes are those that vLLM's clients know. Knows nothing of how text becomes tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.protocol.base import RequestModel
from dashinfer.protocol.chat import MAX_MESSAGES
from dashinfer.protocol.fields import TokenId
from dashinfer.protocol.messages import Message, has_media, template_message

MAX_TOKENS = 2**20  # of one request to be detokenised

_encode = msgspec.json.Encoder().encode


def _given(name: str, kind: str) -> dict[str, Any]:
    """JSON Schema of an object that has a field, which is not null."""
    return {"required": [name], "properties": {name: {"type": kind}}}


class TokenizeRequest(RequestModel):
    """A prompt, or messages as a chat has them."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given("prompt", "string"), _given("messages", "array")]})

    model: str | None = Field(default=None, description="default: the model that is served")
    prompt: str | None = Field(default=None, description="text; excludes messages")
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES, description="rendered by the chat template; no images and videos"
    )
    add_special_tokens: bool | None = Field(
        default=None, description="those that the tokeniser puts around a text; default: true for a prompt, false for messages"
    )
    return_token_strs: bool = Field(default=False, description="give token_strs too")
    add_generation_prompt: bool = Field(default=True, description="open an answer after the last message")
    continue_final_message: bool = Field(default=False, description="go on with the last message")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64, description="names for the chat template")

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("at:prompt", "or `messages` must be given, and not both")
        for number, message in enumerate(self.messages or ()):
            if has_media(message):
                raise PydanticCustomError(f"at:messages.{number}", "has images or videos, whose tokens are not counted here")
        if self.continue_final_message:
            if "add_generation_prompt" not in self.model_fields_set:
                self.add_generation_prompt = False
            elif self.add_generation_prompt:
                raise PydanticCustomError("at:continue_final_message", "excludes `add_generation_prompt`")
        return self

    def template_messages(self) -> list[dict[str, Any]]:
        """Plain dictionaries for `ChatTemplate.render`."""
        return [template_message(message) for message in self.messages or ()]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int = Field(description="longest sequence, prompt and answer, in tokens")
    tokens: list[int]
    token_strs: list[str] | None = Field(description="as the vocabulary spells them; null unless asked for")


class DetokenizeRequest(RequestModel):
    """Tokens to become text."""

    model: str | None = Field(default=None, description="default: the model that is served")
    tokens: Annotated[list[TokenId], Field(fail_fast=True)] = Field(max_length=MAX_TOKENS)


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to know of special tokens to tokenise here. Null where the tokeniser has none."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: int
    model_max_length: int = Field(description="longest sequence, prompt and answer, in tokens")


def tokenizer_info_body(special_tokens: Mapping[str, str], *, vocab_size: int, max_length: int) -> bytes:
    """JSON of a TokenizerInfo."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    found = {name: special_tokens.get(name) for name in names}
    return _encode({**found, "vocab_size": vocab_size, "model_max_length": max_length})


def tokenize_body(tokens: Sequence[int], *, max_length: int, token_strs: Sequence[str] | None) -> bytes:
    """JSON of a TokenizeResponse."""
    return _encode({"count": len(tokens), "max_model_len": max_length, "tokens": tokens, "token_strs": token_strs})


def detokenize_body(text: str) -> bytes:
    """JSON of a DetokenizeResponse."""
    return _encode({"prompt": text})
