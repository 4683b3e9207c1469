"""`sampling_params`: from a request and the model's defaults to the engine's `SamplingParams`.

What a request leaves open comes from the model's generation_config: `temperature`, `top_p`, `top_k`, `min_p` and
`repetition_penalty`, where it has numbers for them. Its `do_sample` is not read, since a server's clients expect to sample
unless they say `temperature: 0`; what is missing there too has OpenAI's defaults.

`max_tokens` that is more than the context leaves is clamped to what it leaves, and the answer then ends with finish reason
`length`; it is no error, as clients tend to send one large value with every request. Knows nothing of text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dashinfer.errors import ContextLengthExceeded, InvalidRequest
from dashinfer.protocol.fields import GREATEST_REPETITION_PENALTY, LEAST_REPETITION_PENALTY, SamplingFields
from dashinfer.types import SamplingParams

_SEEDS = 2**63

# Workers compute in float32, where much smaller numbers are zero: below these a draw is as good as greedy.
_LEAST_TEMPERATURE = 1e-5
_LEAST_TOP_P = 1e-6

# The ranges that requests are held to, for generation_config.json, which comes from anywhere. No NaN lies in one.
_RANGES: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0 <= value <= 2,
    "top_p": lambda value: 0 < value <= 1,
    "top_k": lambda value: -1 <= value < 2**63,
    "min_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: LEAST_REPETITION_PENALTY <= value <= GREATEST_REPETITION_PENALTY,
}


def no_room(max_length: int, size: str, param: str = "messages") -> ContextLengthExceeded:
    """The refusal of a prompt that does not fit into `max_length` tokens; `size` is how long it is, with the unit.

    Clients tell it from others by its words: LangChain by the first, LiteLLM by the next.
    """
    have, them = ("the messages have", "them") if param == "messages" else (f"`{param}` has", "it")
    return ContextLengthExceeded(
        f"prompt is too long: this model's maximum context length is {max_length} tokens, and {have} {size}: "
        f"shorten {them}, or start the server with a larger --max-length",
        param=param,
    )


def sampling_params(
    request: SamplingFields,
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
        eos_token_ids: as the model's files name them; what is no id of the vocabulary is left out.
        vocab_size: number of logits; ids must be below.
        prompt_tokens, max_length: in tokens; their difference is the room for the answer. Of a prompt with more positions than
            tokens, `prompt_tokens` is the number of those.
        new_seed: draws a seed for a request that has none.

    Raises:
        ContextLengthExceeded: the prompt leaves no room.
        InvalidRequest: a token id outside of the vocabulary.
    """
    room = max_length - prompt_tokens
    if room < 1:
        raise no_room(max_length, f"{prompt_tokens} tokens")
    for field, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        for token in ids:
            if token >= vocab_size:
                raise InvalidRequest(f"`{field}` has the token {token}; the last one is {vocab_size - 1}", param=field)

    max_tokens = min(room, request.token_limit or room)
    stop_ids = {*request.stop_token_ids}
    if not request.ignore_eos:
        stop_ids |= {token for token in eos_token_ids if 0 <= token < vocab_size}
    seed = new_seed() if request.seed is None else request.seed

    def chosen(name: str, default: float) -> float:
        value = getattr(request, name)
        return _default(generation_config, name, default) if value is None else value

    temperature = float(chosen("temperature", 1.0))
    top_k = max(0, int(chosen("top_k", 0)))
    return [
        SamplingParams(
            max_tokens=max_tokens,
            seed=(seed + i) % _SEEDS,
            temperature=temperature if temperature >= _LEAST_TEMPERATURE else 0.0,
            top_k=top_k if top_k < vocab_size else 0,
            top_p=max(float(chosen("top_p", 1.0)), _LEAST_TOP_P),
            min_p=float(chosen("min_p", 0.0)),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=float(chosen("repetition_penalty", 1.0)),
            logit_bias=request.logit_bias,
            min_tokens=min(request.min_tokens, max_tokens),
            stop_token_ids=tuple(sorted(stop_ids)),
            logprobs=request.num_logprobs,
        )
        for i in range(request.n)
    ]


def _default(generation_config: Mapping[str, Any], name: str, otherwise: float) -> float:
    value = generation_config.get(name)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and _RANGES[name](value)
    return value if usable else otherwise
