"""Pictures to ask about: no two alike, the same ones for the same seed, and about as hard to compress as photographs.

Needs Pillow.
"""

import base64
import io
import random
from typing import Any, Literal

from PIL import Image, ImageDraw

Size = tuple[int, int]  # width and height in pixels
ImageFormat = Literal["png", "jpeg"]

QUESTION = "What is in the picture?"
GRAIN = 4  # pixels across one grain of the texture
CONTRAST = 0.3


def draw(seed: str, size: Size) -> Image.Image:
    """An RGB picture: a coloured texture, and shapes on it."""
    draws = random.Random(seed)
    grains = tuple(max(side // GRAIN, 1) for side in size)
    texture = Image.frombytes("RGB", grains, draws.randbytes(3 * grains[0] * grains[1]))
    ground = Image.new("RGB", size, _colour(draws))
    picture = Image.blend(ground, texture.resize(size, Image.Resampling.BICUBIC), CONTRAST)
    canvas = ImageDraw.Draw(picture)
    radius = max(min(size) // 8, 1)
    for shape in draws.choices((canvas.ellipse, canvas.rectangle), k=3):
        x, y = (draws.randrange(side) for side in size)
        shape((x - radius, y - radius, x + radius, y + radius), fill=_colour(draws))
    return picture


def red_circle() -> Image.Image:
    """A picture that has one right answer."""
    picture = Image.new("RGB", (168, 168), "white")
    ImageDraw.Draw(picture).ellipse((54, 54, 114, 114), fill="red")
    return picture


def make_question(picture: Image.Image, image_format: ImageFormat) -> list[dict[str, Any]]:
    """What a message holds: the picture as a `data:` URI, then `QUESTION`."""
    file = io.BytesIO()
    picture.save(file, image_format.upper())
    uri = f"data:image/{image_format};base64,{base64.b64encode(file.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": QUESTION}]


def _colour(draws: random.Random) -> tuple[int, int, int]:
    return draws.randrange(256), draws.randrange(256), draws.randrange(256)
