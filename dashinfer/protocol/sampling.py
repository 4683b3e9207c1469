"""`sampling_params`: from a request and the model's defaults to the engine's `SamplingParams`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.types import SamplingParams


def sampling_params(
    request: ChatCompletionRequest,
    *,
    generation_config: Mapping[str, Any],
    eos_token_ids: Sequence[int],
    vocab_size: int,
    prompt_tokens: int,
    max_length: int,
    new_seed: Callable[[], int],
) -> list[SamplingParams]:
    """One for each choice. `max_tokens` beyond the room that is left is clamped to it; a prompt without room is refused.

    Raises:
        ContextLengthExceeded: prompt_tokens >= max_length.
        InvalidRequest: a token id outside of the vocabulary.
    """
    raise NotImplementedError
