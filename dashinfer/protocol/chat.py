"""Requests and responses of `/v1/chat/completions`, `/v1/models` and `/health` as pydantic models."""

from typing import Any, Literal

from pydantic import BaseModel


class ChatCompletionRequest(BaseModel):
    model: str
    stream: bool
    n: int
    stop: list[str]  # normalised: always a list
    logprobs: bool
    top_logprobs: int
    skip_special_tokens: bool
    chat_template_kwargs: dict[str, Any]
    continue_final_message: bool
    add_generation_prompt: bool

    @property
    def include_usage(self) -> bool:
        raise NotImplementedError

    def template_messages(self) -> list[dict[str, Any]]:
        """Plain dictionaries for `ChatTemplate.render`."""
        raise NotImplementedError


class Health(BaseModel):
    status: Literal["ok", "loading", "draining", "failed"]
    mode: Literal["llm", "vlm"] | None
