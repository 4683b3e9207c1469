"""Prompts: distinct, repeatable, of the wanted length."""

import pytest

from dashinfer.bench.prompts import CLOSING, WORDS, calibrate, make_prompt
from dashinfer.errors import BenchError


def test_the_same_seed_draws_the_same_prompt_and_no_two_seeds_share_a_beginning() -> None:
    prompts = [make_prompt(str(seed), 60) for seed in range(500)]

    assert make_prompt("7", 60) == prompts[7]
    assert len({tuple(prompt.split()[:4]) for prompt in prompts}) == 500


def test_a_prompt_has_as_many_words_as_asked_for() -> None:
    assert len(make_prompt("1", 9).removesuffix(CLOSING).split()) == 9


def test_words_are_distinct_and_plain() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in WORDS)


@pytest.mark.parametrize("around", [0, 37, 104])
async def test_calibration_finds_the_number_of_words(around: int) -> None:
    async def count_tokens(prompt: str) -> int:
        return around + len(prompt.removesuffix(CLOSING).split())

    assert await calibrate(count_tokens, 105) == (105 - around, 1)


@pytest.mark.parametrize(("tokens_per_word", "tokens"), [(1.2, 105), (0.8, 105), (4.2, 105), (4.2, 2000), (1.2, 32)])
async def test_calibration_settles_where_words_are_not_tokens(tokens_per_word: float, tokens: int) -> None:
    async def count_tokens(prompt: str) -> int:
        return 30 + int(len(prompt.removesuffix(CLOSING).split()) * tokens_per_word)

    words, slope = await calibrate(count_tokens, tokens)

    assert await count_tokens(make_prompt("any", words)) == pytest.approx(tokens, abs=tokens_per_word)
    assert slope == pytest.approx(tokens_per_word, rel=0.25)


async def test_without_a_count_one_word_is_one_token() -> None:
    async def count_tokens(prompt: str) -> None:
        return None

    assert await calibrate(count_tokens, 105) == (105, 1)


async def test_a_length_that_the_template_alone_exceeds_is_refused() -> None:
    async def count_tokens(prompt: str) -> int:
        return 40 + len(prompt.removesuffix(CLOSING).split())

    with pytest.raises(BenchError, match="as short as 20 tokens"):
        await calibrate(count_tokens, 20)
