"""Prompts of a wanted length in tokens, different from their first words on, and the same ones for the same seed.

No two prompts begin with the same few words, so a prefix cache has nothing to give beyond the chat template's own text, unless
they are given a prefix to share. The words are common English ones, which nearly every vocabulary holds as one token each, so
that prompts of as many words have nearly the same length; what the length really was is read from the server's `usage`.
"""

import random
from collections.abc import Awaitable, Callable, Sequence

from dashinfer.errors import BenchError

# Common one-token nouns, verbs and adjectives; no names, no digits.
WORDS = (  # noqa: SIM905 (twelve lines rather than three hundred)
    "time year people way day man thing woman life child world school state family student group country problem hand part "
    "place case week company system program question work government number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father power "
    "hour game line end member law car city community name president team minute idea body information back parent face "
    "level office door health person art war history party result change morning reason research girl guy moment air "
    "teacher force education foot boy age policy music market sense nation plan college interest death experience effect "
    "use class control field development role effort rate heart drug show leader light voice wife police mind price report "
    "decision son view relationship town road arm difference value building action season society tax director position "
    "player record paper space ground form event matter center couple site project activity star table need court oil "
    "situation cost industry figure street image phone data picture practice piece land product doctor wall patient worker "
    "news test movie north love support technology step baby computer type attention film tree source organization hair "
    "look century evidence window culture chance brother energy period course summer plant opportunity term letter "
    "condition choice rule daughter south husband floor campaign material population call economy"
).split()
CLOSING = "Write a long story in which each of these words comes up."


def draw_words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def make_prompt(seed: str, words: int, prefix: Sequence[str] = ()) -> str:
    """`words` words, then what to do with them: first those of `prefix`, and at least one drawn by `seed`."""
    return " ".join([*prefix, *draw_words(seed, max(words - len(prefix), 1))]) + ". " + CLOSING


async def calibrate(count_tokens: Callable[[str], Awaitable[int | None]], tokens: int) -> tuple[int, float]:
    """How many words make a prompt of `tokens` tokens, chat template included.

    Args:
        count_tokens: asks the server how long a prompt is; None if it does not say.
        tokens: the wanted length.

    Returns:
        The number of words, and how many tokens one more of them is. Where the server does not count, one word is taken for one
        token.

    Raises:
        BenchError: the template alone is longer.
    """
    words, slope = max(tokens, 1), 1.0
    known: tuple[int, int] | None = None  # words and tokens of the prompt before
    for attempt in range(5):
        counted = await count_tokens(make_prompt(f"calibrate {attempt}", words))
        if counted is None:
            break
        if known is not None and known[0] != words:
            slope = max((counted - known[1]) / (words - known[0]), 0.1)
        if counted == tokens:
            break
        known, wanted = (words, counted), words + round((tokens - counted) / slope)
        if wanted < 1 and words == 1:
            raise BenchError(
                f"a prompt cannot be as short as {tokens} tokens: the chat template and the task take {counted - 1}"
            )
        words = max(wanted, 1)
    return words, slope
