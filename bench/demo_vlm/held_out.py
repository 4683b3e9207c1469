"""Pictures and questions that no training sees: another seed than its own."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from bench.demo_vlm.pictures import draw_scene, paint
from bench.demo_vlm.questions import KINDS, Exchange, ask_pair

SEED = "held out"
# as often as each is asked, in turn
_TURNS = ("what", "colour", "shape", "where", "count", "exists", "pair", "what", "colour", "where", "count", "exists")


@dataclass(frozen=True)
class Question:
    pictures: tuple[Image.Image, ...]
    exchange: Exchange


def held_out(count: int) -> Iterator[Question]:
    """The first `count` questions; each has pictures of its own."""
    for index in range(count):
        rng, kind = random.Random(f"{SEED} {index}"), _TURNS[index % len(_TURNS)]
        exchange = None
        while exchange is None:
            scenes = [draw_scene(rng) for _ in range(2 if kind == "pair" else 1)]
            exchange = ask_pair(scenes, rng) if kind == "pair" else KINDS[kind](scenes[0], rng)
        yield Question(tuple(paint(scene) for scene in scenes), exchange)


def tally(asked: Iterable[tuple[Question, str]]) -> str:
    """A table of how many answers are right, word for word, by kind of question."""
    total, right = Counter(), Counter()
    for question, answer in asked:
        for kind in (question.exchange.kind, "all"):
            total[kind] += 1
            right[kind] += answer.strip() == question.exchange.answer
    kinds = sorted(total, key=lambda kind: (kind == "all", kind))
    return "\n".join(f"{kind:8} {right[kind]:4} of {total[kind]:4}  {right[kind] / total[kind]:6.1%}" for kind in kinds)
