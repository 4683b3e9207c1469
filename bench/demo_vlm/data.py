"""Conversations about pictures as batches of a training step."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from bench.demo_vlm.files import END, IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START
from bench.demo_vlm.pictures import COLOURS, SHAPES, Scene, draw_scene, paint
from bench.demo_vlm.questions import Exchange, ask, ask_pair, ask_text
from dashinfer.types import Grid
from dashinfer.vision.preprocess import ImageProcessor

MIXED = -1  # of a label: nothing to learn
_SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You are a helpful assistant that sees pictures.")


@dataclass(frozen=True)
class Picture:
    """One that is not painted yet."""

    scene: Scene
    grid: Grid


@dataclass(frozen=True)
class Row:
    """Tokens with one placeholder a picture, which of them are to be learned, and branches: 0 is seen by all that follow, any
    other by itself alone."""

    tokens: list[int]
    learned: list[bool]
    branches: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows of one length, padded on the right.

    Attributes:
        pictures: uint8 [count, patches, patch_dim] of each grid.
        grids: of those.
        tokens: int64 [rows, length].
        branches: int64 [rows, length].
        positions: int64 [3, rows, length].
        targets: int64 [rows, length], the next token where it is of an answer, else -100.
        holders: int64, places of the pictures' tokens among rows * length, pictures in the order of `pictures`.
        labels: int64 [tokens of all pictures, 3]: shape and colour at the centre of each, and whether a shape's own is in it.
        places: int64 [tokens of all pictures, 2]: row and column of each.
    """

    pictures: list[np.ndarray]
    grids: list[Grid]
    tokens: np.ndarray
    branches: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    holders: np.ndarray
    labels: np.ndarray
    places: np.ndarray


def labels(scene: Scene, grid: Grid) -> np.ndarray:
    """int64 [tokens, 3]."""
    rows, columns = grid[1] // 2, grid[2] // 2
    found = np.zeros((rows, columns, 3), np.int64)
    down, across = np.mgrid[:rows, :columns] + 0.5
    down, across = down * scene.height / rows, across * scene.width / columns
    for shape in scene.shapes:
        away = np.hypot(down - shape.y, across - shape.x) / shape.radius
        found[away < 1.15, :2] = MIXED
        found[away < 0.75, :2] = 1 + SHAPES.index(shape.kind), 1 + list(COLOURS).index(shape.colour)
        found[int(shape.y / scene.height * rows), int(shape.x / scene.width * columns), 2] = 1
    return found.reshape(-1, 3)


class Conversations:
    """Rows of tokens, with the chat template's layout."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def row(self, exchanges: Sequence[Exchange], pictures: int, rng: random.Random) -> Row:
        """A conversation, with the pictures in its first turn."""
        tokens: list[int] = []
        learned: list[bool] = []

        def add(ids: list[int], learn: bool = False) -> None:
            tokens.extend(ids)
            learned.extend([learn] * len(ids))

        newline = self._text("\n")
        if rng.random() < 0.12:
            add([IM_START, *self._text(f"system\n{rng.choice(_SYSTEM)}"), IM_END, *newline])
        for index, exchange in enumerate(exchanges):
            add([IM_START, *self._text("user\n")])
            seen = [VISION_START, IMAGE_PAD, VISION_END] * pictures if index == 0 else []
            if rng.random() < 0.6:
                add([*seen, *self._text(exchange.question)])
            else:
                add([*self._text(exchange.question), *seen])
            add([IM_END, *newline, IM_START, *self._text("assistant\n")])
            add([*self._text(exchange.answer), IM_END], True)
            add(newline)
        return Row(tokens, learned, [0] * len(tokens))

    def fan(self, exchanges: Sequence[Exchange], pictures: int) -> Row:
        """Pictures, and first questions about them side by side, none of which sees another."""
        head = [IM_START, *self._text("user\n"), *[VISION_START, IMAGE_PAD, VISION_END] * pictures]
        row = Row(head, [False] * len(head), [0] * len(head))
        for number, exchange in enumerate(exchanges, 1):
            asked = [*self._text(exchange.question), IM_END, *self._text("\n"), IM_START, *self._text("assistant\n")]
            answer = [*self._text(exchange.answer), IM_END]
            row.tokens.extend(asked + answer)
            row.learned.extend([False] * len(asked) + [True] * len(answer))
            row.branches.extend([number] * len(asked + answer))
        return row


def lay_out(row: Row, grids: Sequence[Grid]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Placeholders repeated: tokens, learned and branches [length], positions [3, length]."""
    counts, positions, following, left = [], [], 0, list(grids)
    branch = fork = 0
    for token, own in zip(row.tokens, row.branches, strict=True):
        if own != branch:
            fork = following if branch == 0 else fork
            branch, following = own, fork
        if token == IMAGE_PAD:
            _, height, width = left.pop(0)
            places = np.indices((1, height // 2, width // 2)).reshape(3, -1)
            counts.append(places.shape[1])
            positions.append(places + following)
            following += max(height, width) // 2
        else:
            counts.append(1)
            positions.append(np.full((3, 1), following))
            following += 1
    repeated = (np.repeat(each, counts) for each in (row.tokens, row.learned, row.branches))
    return *repeated, np.concatenate(positions, 1)


def batches(seed: str, tokenizer: Tokenizer, processor: ImageProcessor, size: int, *, skip: int = 0) -> Iterator[Batch]:
    """Endless, from the batch after the first `skip` on. The pictures of a batch have one grid, or two where its conversations
    are about two pictures."""
    rng = random.Random(seed)
    conversations = Conversations(tokenizer)
    pools: dict[Grid, list[Picture]] = defaultdict(list)
    while True:
        scene = draw_scene(rng)
        grid = processor.grid(scene.height, scene.width)
        pool = pools[grid]
        pool.append(Picture(scene, grid))
        if len(pool) < size:
            continue
        full = pools.pop(grid)
        rows: list[tuple[Row, list[Grid]]] = []
        fanned = rng.random() < 0.7
        others = [other for other, waiting in pools.items() if len(waiting) >= size // 2]
        if rng.random() < 0.2 and others:
            other = rng.choice(others)
            half = pools[other][: size // 2]
            pools[other] = pools[other][size // 2 :]
            pools[grid] = full[size // 2 :]
            slots = [full[: size // 2], half]
            rng.shuffle(slots)
            for pair in zip(*slots, strict=True):
                exchanges = [ask_pair([picture.scene for picture in pair], rng) for _ in range(4)]
                kept = [exchange for exchange in exchanges if exchange is not None]
                while not kept:
                    kept = list(filter(None, [ask_pair([picture.scene for picture in pair], rng)]))
                row = conversations.fan(kept, 2) if fanned else conversations.row(kept[:2], 2, rng)
                rows.append((row, [picture.grid for picture in pair]))
            ordered = [[rank * len(half) + at for rank in range(2)] for at in range(len(half))]
        else:
            slots = [full]
            for picture in full:
                exchanges = ask(picture.scene, rng, 5 if fanned else 2)
                row = conversations.fan(exchanges, 1) if fanned else conversations.row(exchanges, 1, rng)
                rows.append((row, [picture.grid]))
            ordered = [[at] for at in range(size)]
        for _ in range(size // 12):
            exchanges = [ask_text(rng, scene) for _ in range(rng.randint(1, 3))]
            rows.append((conversations.row(exchanges, 0, rng), []))
            ordered.append([])
        if skip:
            skip -= 1
        else:
            yield _batch(rows, slots, ordered, processor)


def sights(seed: str, processor: ImageProcessor, size: int) -> Iterator[tuple[np.ndarray, Grid, np.ndarray]]:
    """Endless: pictures alone, uint8 [size, patches, patch_dim] of one grid, and their labels as in `Batch`."""
    rng = random.Random(seed)
    pools: dict[Grid, list[Scene]] = defaultdict(list)
    while True:
        scene = draw_scene(rng)
        grid = processor.grid(scene.height, scene.width)
        pools[grid].append(scene)
        if len(pools[grid]) == size:
            found = pools.pop(grid)
            values = np.stack([processor.patches(np.asarray(paint(each))).values for each in found])
            yield values, grid, np.concatenate([labels(each, grid) for each in found])


def _batch(
    rows: Sequence[tuple[Row, list[Grid]]],
    slots: list[list[Picture]],
    ordered: list[list[int]],
    processor: ImageProcessor,
) -> Batch:
    laid = [lay_out(*row) for row in rows]
    length = max(len(tokens) for tokens, *_ in laid)
    tokens = np.full((len(rows), length), END, np.int64)
    branches = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), -100, np.int64)
    positions = np.zeros((3, len(rows), length), np.int64)
    pictures = [picture for slot in slots for picture in slot]
    sizes = [picture.grid[1] * picture.grid[2] // 4 for picture in pictures]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    holders = np.empty(starts[-1], np.int64)
    for index, (row, learned, own, places) in enumerate(laid):
        tokens[index, : len(row)] = row
        targets[index, : len(row) - 1] = np.where(learned[1:], row[1:], -100)
        branches[index, : len(row)] = own
        positions[:, index, : len(row)] = places
        at = np.flatnonzero(row == IMAGE_PAD) + index * length
        for picture in ordered[index]:
            count = sizes[picture]
            holders[starts[picture] : starts[picture] + count], at = at[:count], at[count:]
    return Batch(
        pictures=[np.stack([processor.patches(np.asarray(paint(picture.scene))).values for picture in slot]) for slot in slots],
        grids=[slot[0].grid for slot in slots],
        tokens=tokens,
        branches=branches,
        positions=positions,
        targets=targets,
        holders=holders,
        labels=np.concatenate([labels(picture.scene, picture.grid) for picture in pictures]),
        places=np.concatenate([np.indices((each.grid[1] // 2, each.grid[2] // 2)).reshape(2, -1).T for each in pictures]),
    )
