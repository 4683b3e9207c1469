"""`sampling_params`: from a request and the model's defaults to the engine's `SamplingParams`.

What a request leaves open comes from the model's generation_config: `temperature`, `top_p`, `top_k`, `min_p` and
`repetition_penalty`, where it has numbers for them. Its `do_sample` is not read, since a server's clients expect to sample
unless they say `temperature: 0`; what is missing there too has OpenAI's defaults.

`max_tokens` that is more than the context leaves is clamped to what it leaves, and the answer then ends with finish reason
`length`; it is no error, as clients tend to send one large value with every request. Knows nothing of text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dashinfer.errors import ContextLengthExceeded, InvalidRequest
from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.types import SamplingParams

_SEEDS = 2**63

# The ranges that requests are held to, for generation_config.json, which comes from anywhere.
_RANGES: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: value >= 0,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: value >= -1,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: value > 0,
}


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
    """One for each of the request's `n` choices; they differ in their seeds alone, choice i having `seed + i`.

    Args:
        vocab_size: number of logits; ids must be below.
        prompt_tokens, max_length: in tokens; their difference is the room for the answer.
        new_seed: draws a seed for a request that has none.

    Raises:
        ContextLengthExceeded: the prompt leaves no room.
        InvalidRequest: a token id outside of the vocabulary.
    """
    room = max_length - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"the context holds {max_length} tokens, and the messages have {prompt_tokens}: "
            "shorten them, or start the server with a larger --max-length",
            param="messages",
        )
    for field, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        for token in ids:
            if token >= vocab_size:
                raise InvalidRequest(f"`{field}` has the token {token}; the last one is {vocab_size - 1}", param=field)

    max_tokens = min(room, request.token_limit or room)
    stop_ids = {*request.stop_token_ids} | (set() if request.ignore_eos else {*eos_token_ids})
    seed = new_seed() if request.seed is None else request.seed

    def chosen(name: str, default: float) -> float:
        value = getattr(request, name)
        return _default(generation_config, name, default) if value is None else value

    top_k = max(0, int(chosen("top_k", 0)))
    return [
        SamplingParams(
            max_tokens=max_tokens,
            seed=(seed + i) % _SEEDS,
            temperature=float(chosen("temperature", 1.0)),
            top_k=top_k if top_k < vocab_size else 0,
            top_p=float(chosen("top_p", 1.0)),
            min_p=float(chosen("min_p", 0.0)),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=float(chosen("repetition_penalty", 1.0)),
            logit_bias=request.logit_bias,
            min_tokens=min(request.min_tokens, max_tokens),
            stop_token_ids=tuple(sorted(stop_ids)),
            logprobs=request.top_logprobs if request.logprobs else None,
        )
        for i in range(request.n)
    ]


def _default(generation_config: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = generation_config.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and _RANGES[name](value)
    return value if usable else otherwise
