from typing import Any

import pytest

from dashinfer.errors import ContextLengthExceeded, InvalidRequest
from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.protocol.sampling import sampling_params
from dashinfer.types import SamplingParams


def made(
    generation_config: dict[str, Any] | None = None, *, prompt_tokens: int = 10, max_length: int = 100, **fields: Any
) -> list[SamplingParams]:
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    return sampling_params(
        request,
        generation_config=generation_config or {},
        eos_token_ids=(9, 2),
        vocab_size=1000,
        prompt_tokens=prompt_tokens,
        max_length=max_length,
        new_seed=lambda: 77,
    )


def test_defaults() -> None:
    assert made() == [SamplingParams(max_tokens=90, seed=77, stop_token_ids=(2, 9))]


def test_defaults_of_the_model() -> None:
    (params,) = made(
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "do_sample": False}
    )

    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (
        0.6,
        0.9,
        20,
        0.1,
        1.05,
    )


def test_the_request_goes_before_the_model() -> None:
    (params,) = made({"temperature": 0.6, "top_k": 20, "top_p": 0.5}, temperature=0.0, top_k=0, top_p=1.0)

    assert (params.temperature, params.top_k, params.top_p) == (0.0, 0, 1.0)


@pytest.mark.parametrize("value", [None, "hot", True, -1, float("nan"), [1]])
def test_nonsense_in_the_models_file_is_ignored(value: Any) -> None:
    assert made({"temperature": value}) == made()


def test_choices_differ_in_their_seeds_alone() -> None:
    first, second = made(n=2, seed=5)

    assert (first.seed, second.seed) == (5, 6)
    assert made(n=2, seed=5) == [first, second]
    assert made(seed=6) == [second]


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_seeds_fit_into_63_bits(seed: int) -> None:
    assert all(0 <= params.seed < 2**63 for params in made(n=2, seed=seed))


def test_length() -> None:
    assert made(max_tokens=5)[0].max_tokens == 5
    assert made(max_tokens=5, max_completion_tokens=6)[0].max_tokens == 6
    assert made(max_tokens=10**9)[0].max_tokens == 90
    assert made(prompt_tokens=99)[0].max_tokens == 1


@pytest.mark.parametrize("prompt_tokens", [100, 101])
def test_a_prompt_that_leaves_no_room(prompt_tokens: int) -> None:
    with pytest.raises(ContextLengthExceeded, match=f"length is 100 tokens, and the messages have {prompt_tokens}") as caught:
        made(prompt_tokens=prompt_tokens)

    assert caught.value.code == "context_length_exceeded"


def test_stop_tokens() -> None:
    assert made(stop_token_ids=[5, 2])[0].stop_token_ids == (2, 5, 9)
    assert made(stop_token_ids=[5], ignore_eos=True)[0].stop_token_ids == (5,)


def test_min_tokens_are_clamped_with_the_room() -> None:
    assert made(min_tokens=200)[0].min_tokens == 90


def test_logprobs() -> None:
    assert made()[0].logprobs is None
    assert made(logprobs=True)[0].logprobs == 0
    assert made(logprobs=True, top_logprobs=3)[0].logprobs == 3


@pytest.mark.parametrize("fields", [{"logit_bias": {"1000": 1.0}}, {"stop_token_ids": [1000]}])
def test_tokens_outside_of_the_vocabulary(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="the token 1000; the last one is 999") as caught:
        made(**fields)

    assert caught.value.param == next(iter(fields))


def test_top_k_of_the_whole_vocabulary_is_off() -> None:
    assert made(top_k=999)[0].top_k == 999
    assert made(top_k=2**70)[0].top_k == 0
    assert made(top_k=-1)[0].top_k == 0


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-50, 9e-6])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(value: float) -> None:
    assert made(temperature=value)[0].temperature == 0.0
    assert made({"temperature": value})[0].temperature == 0.0


@pytest.mark.parametrize("value", [1e-300, 1e-50])
def test_top_p_stays_above_zero_in_float32(value: float) -> None:
    assert made(top_p=value)[0].top_p == 1e-6
    assert made({"top_p": value})[0].top_p == 1e-6


@pytest.mark.parametrize("value", [1e-300, 0.009, 101.0, 1e300, 10**400])
def test_a_repetition_penalty_out_of_bounds_in_the_models_file_is_ignored(value: float) -> None:
    assert made({"repetition_penalty": value}) == made()


@pytest.mark.parametrize("value", [10**400, 1e300, float("inf")])
def test_a_huge_top_k_in_the_models_file_is_off(value: float) -> None:
    assert made({"top_k": value})[0].top_k == 0


def test_ends_outside_of_the_vocabulary_are_left_out() -> None:
    request = ChatCompletionRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    (params,) = sampling_params(
        request,
        generation_config={},
        eos_token_ids=(-1, 2, 9, 10, 10**12),
        vocab_size=10,
        prompt_tokens=1,
        max_length=100,
        new_seed=lambda: 0,
    )

    assert params.stop_token_ids == (2, 9)
