"""Synthetic pictures of coloured shapes: what is in one, and its pixels.

A `Scene` says everything there is to know about a picture; `paint` makes the pixels. Both are determined by the random source,
whatever has been drawn before.
"""

import colorsys
import io
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
# hue in degrees, saturation and value, each from and to
COLOURS = {
    "red": ((-9, 8), (0.8, 1.0), (0.7, 1.0)),
    "orange": ((24, 39), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((51, 61), (0.75, 1.0), (0.9, 1.0)),
    "green": ((105, 145), (0.6, 1.0), (0.45, 1.0)),
    "blue": ((208, 241), (0.7, 1.0), (0.6, 1.0)),
    "purple": ((270, 301), (0.55, 1.0), (0.45, 0.85)),
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.04), (0.95, 1.0)),
}
PLACES = ((0, 1), (2, 1), (1, 0), (1, 2), (1, 1))  # column and row of left, right, top, bottom and centre
MAX_ASPECT = 1.8
_CONTRAST = 110.0  # least distance of a shape's colour from the background's, of 441
_SPOTS = ((0.0, 0.30), (0.45, 0.55), (0.70, 1.0))  # of the centre of a shape in each column or row

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """`x` and `y` of its centre, and its radius, in pixels."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    fill: Colour
    angle: float  # degrees


@dataclass(frozen=True)
class Scene:
    """A picture's contents. Shapes do not overlap.

    Attributes:
        place: (column, row) of a single shape, from 0; None where there are several.
        background: colours of its top left and bottom right corner.
        seed: of the noise.
    """

    width: int
    height: int
    shapes: tuple[Shape, ...]
    place: tuple[int, int] | None
    background: tuple[Colour, Colour]
    seed: int


def draw_scene(rng: random.Random) -> Scene:
    """One shape in one of `PLACES`, two that differ, or up to four of a kind."""
    width, height = _size(rng)
    arrangement = rng.choices(("single", "different", "alike"), (45, 30, 25))[0]
    place = None
    if arrangement == "single":
        kinds = [(rng.choice(SHAPES), rng.choice(list(COLOURS)))]
        place = rng.choice(PLACES)
    elif arrangement == "different":
        kinds = list(zip(rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2), strict=True))
    else:
        kinds = [(rng.choice(SHAPES), rng.choice(list(COLOURS)))] * rng.randint(2, 4)
    tones = {colour: _tone(colour, rng) for colour in dict.fromkeys(colour for _, colour in kinds)}
    background = _background(list(tones.values()), rng)
    radii, spots = _arrange(len(kinds), place, width, height, rng)
    shapes = tuple(
        Shape(kind, colour, *spot, radius, tones[colour], rng.uniform(-14, 14))
        for (kind, colour), radius, spot in zip(kinds, radii, spots, strict=True)
    )
    return Scene(width, height, shapes, place, background, rng.getrandbits(32))


def _size(rng: random.Random) -> tuple[int, int]:
    side = rng.uniform(200, 400) if rng.random() < 0.1 else rng.uniform(80, 190)
    stretch = math.sqrt(MAX_ASPECT ** rng.uniform(-1, 1)) if rng.random() < 0.7 else 1.0
    return round(side * stretch), round(side / stretch)


def _tone(colour: str, rng: random.Random) -> Colour:
    hue, saturation, value = (rng.uniform(*ends) for ends in COLOURS[colour])
    return _rgb(hue / 360, saturation, value)


def _rgb(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _background(tones: list[Colour], rng: random.Random) -> tuple[Colour, Colour]:
    """Pale, grey or dark, plain or not, in contrast with every tone."""
    while True:
        ends = []
        for _ in range(2):
            value = rng.choice((1.0, rng.uniform(0.75, 1), rng.uniform(0.75, 1), rng.uniform(0.35, 0.75), rng.uniform(0, 0.3)))
            ends.append(_rgb(rng.random(), rng.choice((0.0, rng.uniform(0, 0.25))), value))
        first, second = ends
        if rng.random() < 0.6:
            second = first
        if math.dist(first, second) < 130 and all(
            math.dist(tone, end) > _CONTRAST for tone in tones for end in (first, second)
        ):
            return first, second


def _arrange(
    count: int, place: tuple[int, int] | None, width: int, height: int, rng: random.Random
) -> tuple[list[float], list[tuple[float, float]]]:
    """Radii and centres."""
    side, limit = math.sqrt(width * height), 0.28 * min(width, height)
    if place is not None:
        radius = min(rng.uniform(0.16, 0.27) * side, limit)
        spot = tuple(
            rng.uniform(max(radius, _SPOTS[at][0] * length), min(length - radius, _SPOTS[at][1] * length))
            for at, length in zip(place, (width, height), strict=True)
        )
        return [radius], [spot]
    widest = {2: 0.22, 3: 0.19, 4: 0.17}[count]
    while True:
        alike = rng.uniform(0.14, widest)
        radii = [min(alike * side * rng.uniform(0.9, 1.1), limit) for _ in range(count)]
        spots: list[tuple[float, float]] = []
        for radius in radii:
            for _ in range(40):
                spot = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
                if all(math.dist(spot, other) > 1.15 * (radius + reach) for other, reach in zip(spots, radii, strict=False)):
                    spots.append(spot)
                    break
            else:
                break
        if len(spots) == count:
            return radii, spots


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners of a polygon, about (0, 0), with a radius of 1."""
    if shape.kind == "square":
        return [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
    if shape.kind == "triangle":
        return [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)]
    turns = [(math.pi * step / 5 - math.pi / 2, 0.42 if step % 2 else 1.0) for step in range(10)]
    return [(reach * math.cos(turn), reach * math.sin(turn)) for turn, reach in turns]


def paint(scene: Scene) -> Image.Image:
    """The picture, RGB: smooth or jagged, clean or with noise or JPEG's artefacts, as the scene's seed has it."""
    rng = random.Random(scene.seed)
    scale = 1 if rng.random() < 0.2 else 2
    canvas = _ground(scene).resize((scene.width * scale, scene.height * scale), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(canvas)
    edge = rng.choice((None, None, None, None, (20, 20, 20), (245, 245, 245)))
    for shape in scene.shapes:
        radius = shape.radius * scale
        line = max(1, round(radius * 0.07))
        x, y = shape.x * scale, shape.y * scale
        if shape.kind == "circle":
            reach = 0.93 * radius
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=shape.fill, outline=edge, width=line if edge else 0)
            continue
        turn = math.radians(shape.angle)
        sine, cosine = math.sin(turn) * radius, math.cos(turn) * radius
        corners = [(x + u * cosine - v * sine, y + u * sine + v * cosine) for u, v in _outline(shape)]
        pen.polygon(corners, fill=shape.fill, outline=edge, width=line if edge else 1)
    if scale > 1:
        canvas = canvas.reduce(scale)
    deviation = rng.choice((0, 0, 0, rng.uniform(2, 8), rng.uniform(4, 16)))
    if deviation:
        noise = np.random.default_rng(scene.seed).standard_normal((scene.height, scene.width, 3), np.float32) * deviation
        canvas = Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))
    if rng.random() < 0.1:
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=rng.randint(40, 90))
        canvas = Image.open(file).convert("RGB")
    return canvas


def _ground(scene: Scene) -> Image.Image:
    first, second = (np.array(end, np.float32) for end in scene.background)
    across = np.linspace(0, 1, 16, dtype=np.float32)
    share = ((across[:, None] + across) / 2)[..., None]
    return Image.fromarray(np.round(first + (second - first) * share).astype(np.uint8))
