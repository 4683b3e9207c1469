"""Questions about pictures of shapes and their answers, in words.

There is one right answer to a question, word for word; questions come in many wordings.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.demo_vlm.pictures import COLOURS, SHAPES, Scene

NUMBERS = ("no", "one", "two", "three", "four")
_PLACES = {
    (1, 0): "at the top",
    (0, 1): "on the left",
    (1, 1): "in the centre",
    (2, 1): "on the right",
    (1, 2): "at the bottom",
}
_ORDINALS = ("first", "second")


@dataclass(frozen=True)
class Exchange:
    kind: str
    question: str
    answer: str


def plural(kind: str) -> str:
    return f"{kind}s"


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _pick(rng: random.Random, *wordings: str) -> str:
    """One of the wordings, as different people type it."""
    text = rng.choice(wordings)
    if rng.random() < 0.35:
        text = text.replace("colour", "color")
    if rng.random() < 0.25:
        text = text.replace("picture", "image")
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = text.removesuffix("?").removesuffix(".")
    return text


def contents(scene: Scene) -> str | None:
    """What is in the picture, from left to right: "A red circle and a blue star." None where the order is not plain."""
    kinds = {(shape.kind, shape.colour) for shape in scene.shapes}
    if len(kinds) == 1:
        kind, colour = next(iter(kinds))
        if len(scene.shapes) == 1:
            return _sentence(a(f"{colour} {kind}"))
        return _sentence(f"{NUMBERS[len(scene.shapes)]} {colour} {plural(kind)}")
    if len(kinds) < len(scene.shapes):
        return None
    ordered = sorted(scene.shapes, key=lambda shape: shape.x)
    if any(right.x - left.x < 0.12 * scene.width for left, right in pairwise(ordered)):
        return None
    return _sentence(" and ".join(a(f"{shape.colour} {shape.kind}") for shape in ordered))


def ask_what(scene: Scene, rng: random.Random) -> Exchange | None:
    if (answer := contents(scene)) is None:
        return None
    question = _pick(
        rng,
        "What is in this picture?",
        "What is in the picture?",
        "What do you see?",
        "What can you see in this picture?",
        "Describe this picture.",
        "Describe the picture.",
        "What does this picture show?",
        "What is this?",
        "What's in this picture?",
        "Tell me what is in the picture.",
    )
    return Exchange("what", question, answer)


def ask_colour(scene: Scene, rng: random.Random) -> Exchange | None:
    shape = rng.choice(scene.shapes)
    several = sum(other.kind == shape.kind for other in scene.shapes) > 1
    noun = plural(shape.kind) if several else shape.kind
    verb = "are" if several else "is"
    question = _pick(
        rng,
        f"What colour {verb} the {noun}?",
        f"What colour {verb} the {noun}?",
        f"Which colour {verb} the {noun}?",
        f"What is the colour of the {noun}?",
        f"What colour {verb} the {noun} in this picture?",
        f"Tell me the colour of the {noun}.",
        f"The {noun}: what colour?",
    )
    return Exchange("colour", question, f"The {noun} {verb} {shape.colour}.")


def ask_shape(scene: Scene, rng: random.Random) -> Exchange | None:
    shape = rng.choice(scene.shapes)
    if sum(other.colour == shape.colour for other in scene.shapes) > 1:
        return None
    wordings = [
        f"What shape is {shape.colour}?",
        f"Which shape is {shape.colour}?",
        f"What shape is the {shape.colour} one?",
        f"What is the {shape.colour} shape?",
        f"What shape is the {shape.colour} object?",
    ]
    if len(scene.shapes) == 1:
        wordings += ["What shape is this?", "What shape is it?", "Which shape is in the picture?", "What shape do you see?"]
    return Exchange("shape", _pick(rng, *wordings), f"It is {a(shape.kind)}.")


def ask_where(scene: Scene, rng: random.Random) -> Exchange | None:
    if scene.place is None:
        return None
    kind = rng.choice((scene.shapes[0].kind, scene.shapes[0].kind, "shape"))
    question = _pick(
        rng,
        f"Where is the {kind}?",
        f"Where is the {kind}?",
        f"Where is the {kind} in this picture?",
        f"Where do you see the {kind}?",
        f"In which part of the picture is the {kind}?",
        f"What is the position of the {kind}?",
        f"Where in the picture is the {kind}?",
    )
    return Exchange("where", question, f"The {kind} is {_PLACES[scene.place]}.")


def ask_count(scene: Scene, rng: random.Random) -> Exchange | None:
    kind = rng.choice((rng.choice(scene.shapes).kind, rng.choice(scene.shapes).kind, "shape", "shape", rng.choice(SHAPES)))
    count = sum(kind in ("shape", shape.kind) for shape in scene.shapes)
    nouns = plural(kind)
    question = _pick(
        rng,
        f"How many {nouns} are there?",
        f"How many {nouns} are there?",
        f"How many {nouns} are in this picture?",
        f"How many {nouns} do you see?",
        f"How many {nouns} can you see in the picture?",
        f"Count the {nouns}.",
        f"What is the number of {nouns}?",
    )
    answer = f"There is one {kind}." if count == 1 else f"There are {NUMBERS[count]} {nouns}."
    return Exchange("count", question, answer)


def ask_exists(scene: Scene, rng: random.Random) -> Exchange | None:
    shape, form = rng.choice(scene.shapes), rng.randrange(3)
    kind, colour = shape.kind, shape.colour
    if rng.random() < 0.5:
        if form == 2 and rng.random() < 0.5:
            kind, colour = rng.choice(scene.shapes).kind, rng.choice(scene.shapes).colour  # both there, together or not
        elif form == 1 or (form == 2 and rng.random() < 0.5):
            colour = rng.choice(list(COLOURS))
        else:
            kind = rng.choice(SHAPES)
    noun = (kind, f"{colour} shape", f"{colour} {kind}")[form]
    found = any(noun in (each.kind, f"{each.colour} shape", f"{each.colour} {each.kind}") for each in scene.shapes)
    question = _pick(
        rng,
        f"Is there {a(noun)}?",
        f"Is there {a(noun)}?",
        f"Is there {a(noun)} in this picture?",
        f"Do you see {a(noun)}?",
        f"Can you see {a(noun)} in the picture?",
        f"Does this picture show {a(noun)}?",
    )
    return Exchange("exists", question, f"Yes, there is {a(noun)}." if found else f"No, there is no {noun}.")


KINDS: dict[str, Callable[[Scene, random.Random], Exchange | None]] = {
    "what": ask_what,
    "colour": ask_colour,
    "shape": ask_shape,
    "where": ask_where,
    "count": ask_count,
    "exists": ask_exists,
}


def ask(scene: Scene, rng: random.Random, count: int) -> list[Exchange]:
    """Up to `count` exchanges about a picture, of different kinds first."""
    found: list[Exchange] = []
    while len(found) < count:
        for kind in rng.sample(list(KINDS), len(KINDS)):
            if len(found) < count and (exchange := KINDS[kind](scene, rng)) is not None:
                found.append(exchange)
    return found


def ask_pair(scenes: Sequence[Scene], rng: random.Random) -> Exchange | None:
    """A question about two pictures, in their order."""
    at = rng.randrange(2)
    scene, nth = scenes[at], _ORDINALS[at]
    form = rng.randrange(3)
    if form == 0:
        shape = rng.choice(scene.shapes)
        noun = rng.choice((shape.kind, f"{shape.colour} {shape.kind}"))
        if any(noun in (each.kind, f"{each.colour} {each.kind}") for each in scenes[1 - at].shapes):
            return None
        question = _pick(
            rng,
            f"Which picture shows {a(noun)}?",
            f"Which picture has {a(noun)}?",
            f"In which picture is there {a(noun)}?",
            f"Which of the two pictures shows {a(noun)}?",
        )
        return Exchange("pair", question, f"The {nth} picture.")
    if form == 1:
        if (answer := contents(scene)) is None:
            return None
        wordings = f"What is in the {nth} picture?", f"What does the {nth} picture show?", f"Describe the {nth} picture."
        return Exchange("pair", _pick(rng, *wordings), answer)
    shape = rng.choice(scene.shapes)
    if sum(each.kind == shape.kind for each in scene.shapes) > 1:
        return None
    question = _pick(
        rng, f"What colour is the {shape.kind} in the {nth} picture?", f"In the {nth} picture, what colour is the {shape.kind}?"
    )
    return Exchange("pair", question, f"The {shape.kind} is {shape.colour}.")


_HELLO = "Hello! Show me a picture with shapes and ask me about it."
_NAME = "I am the demo model of DashInfer. I am small and know only pictures with coloured shapes."
_SKILLS = "I can tell the shape, colour, place and number of shapes in a picture."
_NOTHING = "I see no picture. Please send one."
_OTHER = "I do not know. I only know pictures with coloured shapes."
_TEXT = {
    _HELLO: (
        "Hello",
        "Hi",
        "Hello!",
        "Hi!",
        "Hi there!",
        "Hey",
        "Good morning",
        "Good evening",
        "Hello, how are you?",
        "hi there",
    ),
    _NAME: ("Who are you?", "What are you?", "What is your name?", "Which model are you?", "Who made you?", "Are you a robot?"),
    _SKILLS: (
        "What can you do?",
        "What do you know?",
        "Help",
        "How can you help me?",
        "What are you for?",
        "What can I ask you?",
        "Which shapes do you know?",
    ),
    "You are welcome.": ("Thanks", "Thank you!", "Thank you.", "Thank you very much.", "Great, thanks!", "Well done!"),
    "Goodbye!": ("Bye", "Goodbye", "Bye!", "See you", "See you later!"),
    _OTHER: (
        "Tell me a story.",
        "Write a poem.",
        "What is the capital of France?",
        "What is 2 + 2?",
        "What is the weather like?",
        "Tell me a joke.",
        "Write a program in Python.",
        "Why is the sky blue?",
        "Explain gravity.",
        "Once upon a time",
        "Say something.",
        "Count to ten.",
        "What time is it?",
        "Translate this to German.",
        "Who won the match?",
        "Give me a recipe for bread.",
    ),
}


def ask_text(rng: random.Random, scene: Scene) -> Exchange:
    """An exchange without a picture; some ask about one that is not there, which `scene` only lends the words."""
    if rng.random() < 0.4:
        return Exchange("text", ask(scene, rng, 1)[0].question, _NOTHING)
    answer = rng.choice(list(_TEXT))
    return Exchange("text", _pick(rng, *_TEXT[answer]), answer)
