"""Prompts of a wanted length in tokens, different from their first words on, and the same ones for the same seed.

No two prompts begin with the same few words, so a prefix cache has nothing to give beyond the chat template's own text. The
words are common English ones, which nearly every vocabulary holds as one token each, so that prompts of as many words have
nearly the same length; what the length really was is read from the server's `usage`.
"""

import random
from collections.abc import Awaitable, Callable

from dashinfer.bench.target import BenchError

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


def make_prompt(seed: str, words: int) -> str:
    """`words` words drawn by `seed`, then what to do with them."""
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + ". " + CLOSING


async def calibrate(count_tokens: Callable[[str], Awaitable[int | None]], tokens: int) -> int:
    """How many words make a prompt of `tokens` tokens, chat template included.

    Args:
        count_tokens: asks the server how long a prompt is; None if it does not say.
        tokens: the wanted length.

    Returns:
        The number of words. Where the server does not count, one word is taken for one token.

    Raises:
        BenchError: the template alone is longer.
    """
    words = max(tokens, 1)
    for attempt in range(4):
        counted = await count_tokens(make_prompt(f"calibrate {attempt}", words))
        if counted is None or counted == tokens:
            break
        around = counted - words  # the chat template and CLOSING
        if around >= tokens:
            raise BenchError(f"a prompt cannot be as short as {tokens} tokens: the chat template and the task take {around}")
        words = tokens - around
    return words
