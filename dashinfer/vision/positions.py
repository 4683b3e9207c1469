"""Prompts with images and videos: placeholders as many as there are tokens, and the positions that rotate each token.

In Qwen's vision-language models a token has three positions, temporal, height and width (M-RoPE, arXiv:2409.12191). Those of
text are equal and count on; those of an image are its grid's, from where the text before it ended. Text after it goes on at
the greater of the grid's sides, so positions and places in the sequence part; `delta` is what they differ by after the prompt.
Qwen2.5-VL's videos have temporal positions by time (arXiv:2502.13923), Qwen3-VL's are given step by step, after the time of
each in text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dashinfer.errors import InvalidRequest
from dashinfer.models.vision_config import Grid, VisionConfig

_MAX_POSITIONS = 2**24  # up to here float32 has every whole number


@dataclass(frozen=True)
class Medium:
    """An image or a video of a prompt.

    Attributes:
        grid: steps in time, rows and columns of patches.
        seconds_per_step: of a video, between steps, each of which holds `temporal_patch_size` frames.
    """

    kind: Literal["image", "video"]
    grid: Grid
    seconds_per_step: float = 1.0


@dataclass(frozen=True)
class Span:
    """Where a medium's embeddings go.

    Attributes:
        medium: its number in the prompt, images and videos together.
        start: the first of its places in the expanded prompt.
        offset: the first of its embeddings that goes there; not 0 for later steps of a video given step by step.
        length: of places and embeddings.
    """

    medium: int
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class Placement:
    """A prompt as the decoder takes it.

    Attributes:
        tokens: [length] int32, each placeholder repeated.
        spans: of the media, ascending.
        positions: [3, length] int64, temporal, height and width.
        delta: what the token at index i after the prompt adds to i for all its three positions.
    """

    tokens: np.ndarray
    spans: tuple[Span, ...]
    positions: np.ndarray
    delta: int

    @property
    def end(self) -> int:
        """One more than the greatest position. A slow video of small pictures has more positions than tokens; the decoder's
        table of rotations must reach as far, and further for each token produced."""
        return len(self.tokens) + self.delta


def video_text(times: Sequence[float], *, start: str, pad: str, end: str) -> str:
    """What stands in a prompt for the placeholder of a video that is given step by step, before it is tokenised.

    Args:
        times: of the steps, in seconds.
        start: the text of the token before what is seen; `pad` that of the placeholder, `end` that of the token after it.
    """
    return "".join(f"<{time:.1f} seconds>{start}{pad}{end}" for time in times)


def place_media(tokens: Sequence[int] | np.ndarray, media: Sequence[Medium], config: VisionConfig) -> Placement:
    """Expand a tokenised prompt.

    Args:
        tokens: with one placeholder for each image and each video, or for each step of a video where `config.steps_apart`.
        media: in the order of the placeholders.

    Raises:
        InvalidRequest: the prompt has more or fewer placeholders than there are media, or of another kind; or a video lasts
            longer than there are positions.
    """
    prompt = np.asarray(tokens, dtype=np.int32)
    kinds = {config.image_token: "image", config.video_token: "video"}
    parts = _parts(media, config)
    holders = np.flatnonzero(np.isin(prompt, list(kinds)))
    found = [kinds[int(token)] for token in prompt[holders]]
    if found != [media[part.medium].kind for part in parts]:
        raise InvalidRequest(_mismatch(found, [media[part.medium].kind for part in parts], media), param="messages")

    counts = np.ones(len(prompt), dtype=np.int64)
    counts[holders] = [config.num_tokens(part.grid) for part in parts]
    ends = np.cumsum(counts)
    spans, positions, done, following = [], [], 0, 0
    for holder, part in zip(holders, parts, strict=True):
        start = int(ends[holder] - counts[holder])
        positions.append(_text(following, start - done))
        following += start - done
        positions.append(following + _grid_positions(part, config))
        following += max(part.grid[1:]) // config.merge_size
        done = int(ends[holder])
        spans.append(Span(part.medium, start, part.offset, done - start))
    length = int(ends[-1]) if len(ends) else 0
    positions.append(_text(following, length - done))
    joined = np.concatenate(positions, 1)
    delta = int(joined.max(initial=-1)) + 1 - length
    return Placement(np.repeat(prompt, counts), tuple(spans), joined, delta)


@dataclass(frozen=True)
class _Part:
    """What one placeholder stands for: a medium, or a step of it. `interval` is of temporal positions between steps."""

    medium: int
    grid: Grid
    offset: int
    interval: float


def _parts(media: Sequence[Medium], config: VisionConfig) -> list[_Part]:
    parts = []
    for index, medium in enumerate(media):
        steps, height, width = medium.grid
        if medium.kind == "video" and config.steps_apart:
            one = (1, height, width)
            parts += [_Part(index, one, step * config.num_tokens(one), 1.0) for step in range(steps)]
            continue
        timed = medium.kind == "video" and config.tokens_per_second is not None
        interval = config.tokens_per_second * medium.seconds_per_step if timed else 1.0
        if not 0 <= interval * steps < _MAX_POSITIONS:
            raise InvalidRequest(
                f"a video lasts {steps * medium.seconds_per_step:g} seconds, which is too long", param="messages"
            )
        parts.append(_Part(index, medium.grid, 0, interval))
    return parts


def _text(first: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + length), (3, length))


def _grid_positions(part: _Part, config: VisionConfig) -> np.ndarray:
    """[3, tokens], from 0."""
    steps, height, width = part.grid
    places = np.indices((steps, height // config.merge_size, width // config.merge_size)).reshape(3, -1)
    # in float32, as the models were trained: what falls just short of a whole number is cut off
    places[0] = places[0].astype(np.float32) * np.float32(part.interval)
    return places


def _mismatch(found: list[str], wanted: list[str], media: Sequence[Medium]) -> str:
    given = [medium.kind for medium in media]
    if all(found.count(kind) <= wanted.count(kind) for kind in given) and len(found) < len(wanted):
        return (
            "the model's chat template does not show every image and video of these messages; it may show those of some roles "
            "only, such as `user`"
        )
    for kind in ("image", "video"):
        if given.count(kind) == 0 and kind in found:
            return f"the prompt has a placeholder for {kind}s, but no {kind} was given; placeholders cannot be written as text"
    return (
        f"the prompt's placeholders do not go with the {given.count('image')} images and {given.count('video')} videos given; "
        "placeholders cannot be written as text"
    )
