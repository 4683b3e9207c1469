"""Requests and responses of `/v1/chat/completions`, `/v1/models` and `/health` as pydantic models.

Owns every field's type and bounds, and is the source of the OpenAPI document. Knows nothing of how bodies are parsed (`parse`),
what the model's defaults are (`sampling`), or how responses become bytes (`stream`, which tests hold to these models).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.protocol.base import RequestModel, TextOrObjects
from dashinfer.protocol.constraints import ConstrainedRequest
from dashinfer.protocol.fields import SamplingFields
from dashinfer.protocol.messages import (
    Message,
    forget_media,
    has_media,
    message_media,
    name_tool_results,
    template_message,
)
from dashinfer.protocol.tools import CallingRequest
from dashinfer.types import FinishReason
from dashinfer.vision.request import MediumRequest

ChoiceFinish = FinishReason | Literal["tool_calls"]

MAX_MESSAGES = 4096
MAX_TOP_LOGPROBS = 20


class Prediction(RequestModel):
    type: Literal["content"]
    content: TextOrObjects


class ChatCompletionRequest(SamplingFields, ConstrainedRequest, CallingRequest):
    """A chat. A null stands for a field that is left out; an unknown field is refused."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)

    max_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of an answer; the default, and the limit, is what the context leaves"
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description="newer name of max_tokens, goes before it")
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS, description="needs logprobs")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="a name for the chat template; without effect where the template does not read it"
    )
    verbosity: Literal["low", "medium", "high"] | None = Field(default=None, description="as reasoning_effort")

    # Beyond OpenAI
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, max_length=64, description="names for the chat template")
    continue_final_message: bool = Field(default=False, description="go on with the last message")
    add_generation_prompt: bool = Field(
        default=True, description="open an answer after the last message; the default is false with continue_final_message"
    )
    max_thinking_tokens: int | None = Field(
        default=None, ge=0, description="most tokens of the thinking before an answer; its end is forced then"
    )

    # OpenAI's, without a meaning here
    store: bool | None = Field(default=None, description="ignored: nothing is stored")
    metadata: Any = Field(default=None, description="ignored")
    service_tier: str | None = Field(default=None, description="ignored")
    safety_identifier: str | None = Field(default=None, description="ignored")
    prompt_cache_key: str | None = Field(default=None, description="ignored: the prefix cache needs no key")
    prompt_cache_retention: str | None = Field(default=None, description="ignored")
    prediction: Prediction | None = Field(default=None, description="ignored: it would only be a matter of speed")
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        default=None, description='["text"] only'
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("at:top_logprobs", "needs `logprobs` to be true")
        self.check_fields()
        if self.continue_final_message:
            if "add_generation_prompt" not in self.model_fields_set:
                self.add_generation_prompt = False
            elif self.add_generation_prompt:
                raise PydanticCustomError("at:continue_final_message", "excludes `add_generation_prompt`")
        return self

    @property
    def token_limit(self) -> int | None:
        """What the request itself allows; None leaves it to the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Of each token, how many of the likeliest ones besides it; None: no log-probabilities."""
        return self.top_logprobs if self.logprobs else None

    def template_messages(self) -> list[dict[str, Any]]:
        """Plain dictionaries for `ChatTemplate.render`."""
        return name_tool_results([template_message(message) for message in self.messages])

    @property
    def has_media(self) -> bool:
        return any(has_media(message) for message in self.messages)

    def media(self) -> list[MediumRequest]:
        """Its images and videos, in the order in which a template shows them."""
        return [
            medium for number, message in enumerate(self.messages) for medium in message_media(message, f"messages.{number}")
        ]

    def drop_media(self) -> None:
        """Forget where they are, which may be megabytes: the media themselves. They stay in `template_messages`."""
        for message in self.messages:
            forget_media(message)


class TopLogprob(BaseModel):
    token: str
    logprob: float = Field(description="natural logarithm; -9999.0 for a probability of zero")
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob] | None
    refusal: None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="tokens of the prompt that were found in the prefix cache")
    image_tokens: int | None = Field(
        default=None, description="tokens of the prompt that stand for images; with a vision model"
    )
    video_tokens: int | None = Field(
        default=None, description="tokens of the prompt that stand for videos; with a vision model"
    )


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="tokens of the thinking before the answer, with its markers")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = Field(default=None, description="with a model that thinks")


class ResponseFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON text of an object; cut off where the answer is")


class ResponseToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ResponseFunction


class ResponseMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None = Field(description="null where there are calls and no text")
    refusal: None = None
    reasoning_content: str | None = Field(default=None, description="what the model thought, without its markers")
    reasoning: str | None = Field(default=None, description="the same")
    tool_calls: list[ResponseToolCall] | None = None


class Choice(BaseModel):
    index: int
    message: ResponseMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChoiceFinish


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="Unix time in seconds")
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class DeltaFunction(BaseModel):
    name: str | None = None
    arguments: str


class DeltaToolCall(BaseModel):
    index: int
    id: str | None = Field(default=None, description="in a call's first piece, as are type and name")
    type: Literal["function"] | None = None
    function: DeltaFunction


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: ChoiceFinish | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice] = Field(description="empty in the chunk that carries the usage")
    usage: Usage | None = Field(default=None, description="only with stream_options.include_usage; null but in the last chunk")


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int = Field(description="longest sequence, prompt and answer, in tokens")


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "loading", "recovering", "draining", "failed"]
    mode: Literal["llm", "vlm"] | None = Field(description="null until the model is loaded")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail
