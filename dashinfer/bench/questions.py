"""What requests ask, in the order in which they are sent: random words, pictures, or a file's conversations."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dashinfer.bench.client import Content
from dashinfer.bench.prompts import draw_words, make_prompt
from dashinfer.bench.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request.

    Attributes:
        content: of the user's message, or a completion's prompt.
        output_tokens: length of the answer.
        before: messages before the user's.
    """

    content: Content
    output_tokens: int
    before: tuple[dict[str, Any], ...] = ()


def draw_length(tokens: int, ratio: float, draws: random.Random) -> int:
    """A length from `1 - ratio` to `1 + ratio` of `tokens`, at least 1, all equally likely."""
    if not ratio:
        return tokens
    return draws.randint(max(round(tokens * (1 - ratio)), 1), round(tokens * (1 + ratio)))


def random_questions(settings: Settings, name: str, words: int, tokens_per_word: float = 1.0) -> Iterator[Question]:
    """Random words without end, the same for the same seed and `name`, and different for any other.

    Args:
        words: how many make a prompt of `settings.prompt_tokens`.
    """
    shared = round(settings.shared_prefix / tokens_per_word)
    prefixes = [draw_words(f"{settings.seed} prefix {index}", shared) for index in range(settings.prefixes)]
    for index in itertools.count():
        seed = f"{settings.seed} {name} {index}"
        draws = random.Random(f"{seed} lengths")
        longer = draw_length(settings.prompt_tokens, settings.range_ratio, draws) - settings.prompt_tokens
        yield Question(
            content=make_prompt(seed, words + round(longer / tokens_per_word), prefixes[index % len(prefixes)]),
            output_tokens=draw_length(settings.output_tokens, settings.range_ratio, draws),
        )


def picture_questions(settings: Settings, name: str) -> Iterator[Question]:
    """Pictures without end, of the sizes in turn, no two alike."""
    from dashinfer.bench.pictures import draw, make_question

    sizes = itertools.cycle(settings.images)
    for index in itertools.count():
        picture = draw(f"{settings.seed} {name} {index}", next(sizes))
        yield Question(content=make_question(picture, settings.image_format), output_tokens=settings.output_tokens)


def shuffled(questions: Sequence[Question], seed: int) -> Iterator[Question]:
    """A file's questions without end, in an order drawn by `seed`, each once before any comes again."""
    order = list(questions)
    random.Random(f"{seed} dataset").shuffle(order)
    return itertools.cycle(order)
