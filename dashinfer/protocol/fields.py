"""`SamplingFields`: the fields that every request for text shares."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from dashinfer.protocol.base import RequestModel

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000  # characters
MAX_CHOICES = 16
MAX_BIASES = 1024
LEAST_REPETITION_PENALTY, GREATEST_REPETITION_PENALTY = 0.01, 100.0  # beyond them float32 logits overflow

_TOKEN_ID = re.compile("[0-9]{1,10}")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: Any) -> Any:
    """Keys arrive as text, since JSON knows no others."""
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", "has too many items", {"max_length": MAX_BIASES})
    for key in value:
        if not isinstance(key, str) or _TOKEN_ID.fullmatch(key) is None:
            raise PydanticCustomError("bias_key", "has the key {key}, which is no token id", {"key": repr(key)[:40]})
    return {int(key): bias for key, bias in value.items()}


_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[
    list[StopString],
    Field(max_length=MAX_STOP_STRINGS),
    Field(fail_fast=True),
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOP_STRINGS}]}),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[int, Bias],
    BeforeValidator(_biases),
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_BIASES,
        }
    ),
]
TokenId = Annotated[int, Field(ge=0)]


class StreamOptions(RequestModel):
    include_usage: bool = Field(default=False, description="send a last chunk with the usage")
    include_obfuscation: bool = Field(default=False, description="ignored: nothing is added to chunks")


class SamplingFields(RequestModel):
    """How tokens are drawn, when an answer ends, and whether it is streamed."""

    model: str = Field(min_length=1)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy; default: the model's, or else 1")
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: StopStrings = Field(default_factory=list, description="strings that end an answer and are no part of it")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: Biases = Field(default_factory=dict, description="token id to a bias of its logit")
    stream: bool = False
    stream_options: StreamOptions | None = Field(default=None, description="needs stream")
    user: str | None = Field(default=None, description="ignored")

    # Beyond OpenAI
    top_k: int | None = Field(default=None, ge=-1, description="0 and -1 are off")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=LEAST_REPETITION_PENALTY, le=GREATEST_REPETITION_PENALTY)
    min_tokens: int = Field(default=0, ge=0, description="no stop token before that many tokens")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] = Field(default_factory=list, max_length=256)
    ignore_eos: bool = Field(default=False, description="go on after the model's end of turn")
    skip_special_tokens: bool = Field(default=True, description="leave special tokens out of the text")

    @property
    def token_limit(self) -> int | None:
        """What the request itself allows; None leaves it to the context."""
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """Of each token, how many of the likeliest ones besides it; None: no log-probabilities."""
        return None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_fields(self) -> None:
        """Raises PydanticCustomError where fields exclude each other."""
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("at:stream_options", "needs `stream` to be true")
        if self.token_limit is not None and self.min_tokens > self.token_limit:
            raise PydanticCustomError(
                "at:min_tokens",
                "is {least}, more than the {most} tokens allowed at most",
                {"least": self.min_tokens, "most": self.token_limit},
            )
