"""Which frames of a video are taken, and how large they become: the rules of transformers' Qwen video processors.

Two deviations, where theirs fail. Qwen2-VL's indexes come from a float32 `arange` that for some lengths yields one frame too
many, past the end; here they are the exact `i * total // frames`, which is the same otherwise. A video of fewer frames than a
temporal patch is refused there; here its last frame is repeated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from dashinfer.errors import UnsupportedModel

from .preprocess import Grid, Processor, check_aspect, resized, settings

Rule = Literal["qwen2", "qwen3"]


@dataclass(frozen=True, kw_only=True)
class VideoProcessor(Processor):
    """Samples and cuts videos.

    `rule` is "qwen2" (Qwen2-VL and Qwen2.5-VL: pixels are bounded per frame) or "qwen3" (bounded over all frames). `fps` is how
    many frames are taken of a second, within `min_frames` and `max_frames`. `cap_pixels_per_frame` bounds a frame's pixels by
    its share of `max_video_tokens` ("qwen2": of the whole video; "qwen3": of one frame), as Qwen's own utilities do.
    """

    rule: Rule = "qwen2"
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 28 * 28 * 768
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128000

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, model_type: str, max_frames: int | None = None) -> Self:
        """Reads a checkpoint's `video_preprocessor_config.json`, or its image processor's file where there is none.

        `model_type` is config.json's, and decides the rule where the file does not; `max_frames` is the server's own bound.
        Raises UnsupportedModel for a processor of another kind, or settings that make no sense.
        """
        file = "video_preprocessor_config.json"
        kind = config.get("video_processor_type")
        if kind is None:
            kind = "Qwen3VLVideoProcessor" if model_type.startswith("qwen3_vl") else "Qwen2VLVideoProcessor"
        if kind not in ("Qwen2VLVideoProcessor", "Qwen2_5_VLVideoProcessor", "Qwen3VLVideoProcessor"):
            raise UnsupportedModel(f"{file}: videos prepared by {kind!r} are not supported")

        base = Qwen3VideoProcessor if kind == "Qwen3VLVideoProcessor" else cls
        fields = settings(base, config, file)
        for key in ("min_frames", "max_frames", "max_video_tokens", "fps"):
            found = config.get(key)
            if found is None:
                continue
            if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
                raise UnsupportedModel(f"{file}: {key} is {found!r}, not a positive number")
            fields[key] = float(found) if key == "fps" else int(found)
        fields["cap_pixels_per_frame"] = bool(config.get("cap_pixels_per_frame"))
        if max_frames is not None:
            fields["max_frames"] = min(max_frames, fields.get("max_frames", base.max_frames))
        fields["min_frames"] = min(fields.get("min_frames", base.min_frames), fields.get("max_frames", base.max_frames))
        return base(**fields)

    def limited(self, max_frames: int | None) -> Self:
        """The same processor with a request's bound on frames, where that is less; a temporal patch is the least."""
        if max_frames is None or max_frames >= self.max_frames:
            return self
        most = max(max_frames, min(self.temporal_patch_size, self.max_frames))
        return replace(self, max_frames=most, min_frames=min(self.min_frames, most))

    def sample(self, total: int, source_fps: float, fps: float | None = None) -> list[int]:
        """Ascending indexes of the frames taken from `total` frames shown at `source_fps` a second; at least one.

        `fps` is a request's own rate, frames taken of a second.
        """
        wanted = total / source_fps * (fps or self.fps)
        if self.rule == "qwen3":
            import numpy as np

            frames = min(max(int(wanted), self.min_frames), self.max_frames, total)
            return np.linspace(0, total - 1, frames).round().astype(int).tolist()

        step = self.temporal_patch_size
        if total < step:
            return list(range(total))
        most = min(self.max_frames, total) // step * step
        frames = math.floor(min(max(wanted, self.min_frames), most) / step) * step
        return [i * total // frames for i in range(frames)]

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of `frames` sampled frames of `height` and `width` pixels; with them exchanged, its sides are too.

        Raises MediaError for an aspect ratio that the model refuses.
        """
        factor, step = self.factor, self.temporal_patch_size
        frames = max(frames, step)
        if self.rule == "qwen3" and min(height, width) < factor:
            enlarged = max(factor / height, factor / width)
            height, width = int(height * enlarged), int(width * enlarged)
        check_aspect(height, width)

        max_pixels = self.max_pixels
        floor = int(self.min_pixels * 1.05)
        if self.rule == "qwen3":
            if self.cap_pixels_per_frame:
                max_pixels = max(min(self.max_video_tokens * factor**2, max_pixels // frames), floor) * frames
            size = resized(height, width, factor, self.min_pixels, max_pixels, frames=frames, temporal=step)
        else:
            if self.cap_pixels_per_frame:
                max_pixels = max(min(max_pixels, int(self.max_video_tokens * factor**2 * 0.9) * step // frames), floor)
            size = resized(height, width, factor, self.min_pixels, max_pixels)
        return math.ceil(frames / step), size[0] // self.patch_size, size[1] // self.patch_size

    def timestamps(self, indexes: Sequence[int], source_fps: float) -> list[float]:
        """Seconds from the video's start of each temporal step, as Qwen3-VL writes them into the prompt."""
        step = self.temporal_patch_size
        padded = [*indexes, *[indexes[-1]] * (-len(indexes) % step)]
        seconds = [at / source_fps for at in padded]
        return [(seconds[at] + seconds[at + step - 1]) / 2 for at in range(0, len(seconds), step)]


@dataclass(frozen=True, kw_only=True)
class Qwen3VideoProcessor(VideoProcessor):
    """The defaults of Qwen3-VL."""

    rule: Rule = "qwen3"
    patch_size: int = 16
    min_pixels: int = 128 * 32 * 32
    max_pixels: int = 32 * 32 * 768
    max_video_tokens: int = 768
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
