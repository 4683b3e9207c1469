"""Requests and responses of `/v1/embeddings` as pydantic models, and the responses as bytes."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from dashinfer.protocol.base import RequestModel
from dashinfer.protocol.completions import PROMPTS_SCHEMA, prompts
from dashinfer.types import PoolingType

_encode = msgspec.json.Encoder().encode

Inputs = Annotated[list[Any], BeforeValidator(prompts), WithJsonSchema(PROMPTS_SCHEMA)]


class EmbeddingRequest(RequestModel):
    """Texts to become vectors of length 1."""

    input: Inputs = Field(description="text or tokens, or several of either, each of which has an embedding")
    model: str = Field(min_length=1)
    encoding_format: Literal["float", "base64"] = Field(default="float", description="base64 is of little endian float32")
    dimensions: int | None = Field(default=None, ge=1, description="so many of the first ones; default: all")
    user: str | None = Field(default=None, description="ignored")

    # Beyond OpenAI
    pooling: PoolingType = Field(default="mean", description="of hidden states: the mean over all tokens, or the last one's")
    add_special_tokens: bool = Field(default=True, description="those that the tokeniser puts around a text")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embedding_list_body(vectors: Sequence[bytes], *, floats: bool, model: str, prompt_tokens: int) -> bytes:
    """JSON of an EmbeddingList. `vectors`: float32 little endian each."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": memoryview(vector).cast("f").tolist() if floats else base64.b64encode(vector).decode(),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return _encode({"object": "list", "data": data, "model": model, "usage": usage})
