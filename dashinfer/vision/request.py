"""What a request says of one image or video: where it is, and how it is to be prepared. Nothing of it is fetched yet."""

from dataclasses import dataclass
from typing import Literal

MediumKind = Literal["image", "video"]

# OpenAI's `detail: low` is a picture of 512 x 512 at most.
LOW_DETAIL_PIXELS = 512 * 512


@dataclass(frozen=True, slots=True)
class MediumRequest:
    """An image or a video of a request.

    Attributes:
        sources: URLs: one, or of a video that is given as pictures one for each of its frames.
        frames: whether `sources` are frames.
        min_pixels, max_pixels: the request's own bounds of an image after resizing; None: the server's.
        low_detail: at most `LOW_DETAIL_PIXELS`, where `max_pixels` says nothing.
        fps: of a video file, frames to take of a second; of frames, how many a second has. None: the model's own.
        max_frames: most frames to take; None: the model's own.
        param: the field of the request that it came in, for errors.
    """

    kind: MediumKind
    sources: tuple[str, ...]
    frames: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    low_detail: bool = False
    fps: float | None = None
    max_frames: int | None = None
    param: str | None = None
