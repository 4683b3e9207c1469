"""RGB pictures to the patches that a Qwen vision tower takes, as transformers' Qwen2-VL image processor cuts them.

Patches stay uint8: rescaling and normalisation are a table of 256 values a channel, looked up where the tower runs. The table
is part of the result's exactness: transformers rescales in float64 and normalises in float32, which no formula in float32
alone repeats (110 of the 256 values differ in their last bit).

Resizing is Pillow's. Everything here is plain synchronous code for a thread.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dashinfer.errors import InvalidRequest, MediaError, UnsupportedModel
from dashinfer.types import Grid

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


MAX_ASPECT_RATIO = 200  # the model's rule
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMAGE_PROCESSORS = {
    f"{family}ImageProcessor{variant}" for family in ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL") for variant in ("", "Fast", "Pil")
}


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image or video, cut.

    Attributes:
        values: uint8 [t * h * w, channels * temporal_patch_size * patch_size * patch_size]. Patches that are merged into one
            token follow each other: the order is (t, h / merge, w / merge, merge, merge).
        grid: (t, h, w) in patches, before merging.
    """

    values: "np.ndarray"
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class Processor:
    """What image and video processors share: sizes of a patch, bounds in pixels, and the values of the tower's input.

    `min_pixels` and `max_pixels` bound height times width after resizing, and for some video processors times the frames.
    `resample` is Pillow's number of the filter. `mean` and `std` are of the channels, after rescaling.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int
    max_pixels: int
    resample: int = 3
    rescale_factor: float = 1 / 255
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD

    @property
    def factor(self) -> int:
        """What height and width in pixels become multiples of: a token's side."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values a patch."""
        return len(self.mean) * self.temporal_patch_size * self.patch_size**2

    def tokens_of(self, grid: Grid) -> int:
        """Tokens that a grid of patches becomes."""
        return math.prod(grid) // self.merge_size**2

    def table(self) -> "np.ndarray":
        """float32 [channels, 256]: what each value of each channel becomes on the tower's input."""
        import numpy as np

        rescaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (rescaled - mean[:, None]) / std[:, None]

    def pixel_values(self, values: "np.ndarray") -> "np.ndarray":
        """Rescales and normalises patches, uint8 [patches, patch_dim], to float32 of the same shape."""
        import numpy as np

        patches, channels = len(values), len(self.mean)
        by_channel = values.reshape(patches, channels, self.patch_dim // channels)
        result = np.empty(by_channel.shape, np.float32)
        for channel, row in enumerate(self.table()):
            result[:, channel] = row[by_channel[:, channel]]
        return result.reshape(values.shape)

    def empty(self, grid: Grid) -> "np.ndarray":
        """Room for the patches of `grid`, uint8 [t, h * w, patch_dim], to be filled by `cut`."""
        import numpy as np

        return np.empty((grid[0], grid[1] * grid[2], self.patch_dim), np.uint8)

    def cut(self, rgb: "np.ndarray | Image.Image", height: int, width: int, out: "np.ndarray", frame: int) -> None:
        """Resizes a picture, of mode RGB or uint8 [height, width, 3], and writes it as the `frame`th of a temporal patch.

        `height` and `width` are the new ones in pixels, multiples of `factor`; `out` is one temporal step of `empty`'s room,
        [h * w, patch_dim].
        """
        import numpy as np
        from PIL import Image

        picture = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
        if picture.size != (width, height):
            picture = picture.resize((width, height), resample=self.resample)
        merge, patch, channels = self.merge_size, self.patch_size, len(self.mean)
        rows, columns = height // self.factor, width // self.factor
        source = np.asarray(picture).reshape(rows, merge, patch, columns, merge, patch, channels)
        target = out.reshape(rows, columns, merge, merge, channels, self.temporal_patch_size, patch, patch)
        target[..., frame, :, :] = source.transpose(0, 3, 1, 4, 6, 2, 5)

    def repeat(self, out: "np.ndarray", frame: int, start: int) -> None:
        """Copies the `frame`th picture of a temporal patch, as `cut` wrote it, to the places from `start` on."""
        frames = out.reshape(len(out), len(self.mean), self.temporal_patch_size, self.patch_size**2)
        frames[:, :, start:] = frames[:, :, frame : frame + 1]


@dataclass(frozen=True, kw_only=True)
class ImageProcessor(Processor):
    """Cuts images by the rule of Qwen2-VL, which Qwen2.5-VL and Qwen3-VL keep with other numbers."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, min_pixels: int | None = None, max_pixels: int | None = None) -> Self:
        """Reads a checkpoint's `preprocessor_config.json`; the server's own bounds in pixels take the place of the file's.

        Raises UnsupportedModel for a processor of another kind, or settings that make no sense.
        """
        kind = config.get("image_processor_type")
        if kind is not None and kind not in _IMAGE_PROCESSORS:
            raise UnsupportedModel(f"preprocessor_config.json: images prepared by {kind!r} are not supported")
        return cls(**settings(cls, config, "preprocessor_config.json", min_pixels=min_pixels, max_pixels=max_pixels))

    def bounded(self, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Self:
        """The same processor with a request's bounds. Raises InvalidRequest where they leave the server's."""
        if min_pixels is None and max_pixels is None:
            return self
        new = replace(
            self,
            min_pixels=self.min_pixels if min_pixels is None else min_pixels,
            max_pixels=self.max_pixels if max_pixels is None else max_pixels,
        )
        if not self.min_pixels <= new.min_pixels <= new.max_pixels <= self.max_pixels:
            raise InvalidRequest(
                f"min_pixels {new.min_pixels} and max_pixels {new.max_pixels} must be in order and within "
                f"{self.min_pixels} to {self.max_pixels}"
            )
        return new

    def grid(self, height: int, width: int) -> Grid:
        """The grid of an upright image of `height` and `width` pixels; with them exchanged, its sides are too.

        Raises MediaError for an aspect ratio beyond `MAX_ASPECT_RATIO`.
        """
        check_aspect(height, width)
        new = resized(height, width, self.factor, self.min_pixels, self.max_pixels)
        return 1, new[0] // self.patch_size, new[1] // self.patch_size

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image, which its header tells before it is decoded: EXIF orientation does not change their number.

        Raises MediaError as `grid` does.
        """
        return self.tokens_of(self.grid(height, width))

    def patches(self, rgb: "np.ndarray | Image.Image") -> Patches:
        """Resizes and cuts an image, of mode RGB or uint8 [height, width, 3]. Raises MediaError as `grid` does."""
        grid = self.grid(*(rgb.shape[:2] if hasattr(rgb, "shape") else (rgb.height, rgb.width)))
        room = self.empty(grid)
        self.cut(rgb, grid[1] * self.patch_size, grid[2] * self.patch_size, room[0], 0)
        self.repeat(room[0], 0, 1)
        return Patches(room[0], grid)


def check_aspect(height: int, width: int) -> None:
    """Raises MediaError for a picture that is more than `MAX_ASPECT_RATIO` times as long as it is wide."""
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError(f"it has {width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def resized(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, *, frames: int = 1, temporal: int = 1
) -> tuple[int, int]:
    """Height and width, multiples of `factor`, that keep the ratio about and their product within the bounds where it can be.

    The rule of Qwen2-VL (`smart_resize`), with its rounding. With `frames`, a multiple of `temporal` after padding, the bounds
    are of a whole video, as Qwen3-VL has it.
    """
    steps = round(frames / temporal) * temporal
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if steps * new_height * new_width > max_pixels:
        scale = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / scale / factor) * factor)
        new_width = max(factor, math.floor(width / scale / factor) * factor)
    elif steps * new_height * new_width < min_pixels:
        scale = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width


def settings(
    cls: type[Processor],
    config: Mapping[str, Any],
    file: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> dict[str, Any]:
    """The fields of `Processor` as a checkpoint's file has them, defaults of `cls` where it is silent.

    Raises UnsupportedModel for what would not be the same pixels, naming the file.
    """
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not config.get(step, True):
            raise UnsupportedModel(f"{file}: {step} false is not supported")

    size = config.get("size") or {}

    def value(*candidates: Any, key: str, default: Any) -> Any:
        found = next((candidate for candidate in (*candidates, config.get(key)) if candidate is not None), default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
            raise UnsupportedModel(f"{file}: {key} is {found!r}, not a positive number")
        return found

    def bound(server: int | None, key: str, edge: str, default: int) -> int:
        inside = size.get(edge, size.get(key))
        return int(value(server, config.get(key), inside, key=key, default=default))

    fields: dict[str, Any] = {
        "min_pixels": bound(min_pixels, "min_pixels", "shortest_edge", cls.min_pixels),
        "max_pixels": bound(max_pixels, "max_pixels", "longest_edge", cls.max_pixels),
        "rescale_factor": float(value(key="rescale_factor", default=cls.rescale_factor)),
    }
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        fields[key] = int(value(key=key, default=getattr(cls, key)))
    fields["resample"] = config.get("resample", cls.resample)
    if fields["resample"] not in range(6):
        raise UnsupportedModel(f"{file}: resample is {fields['resample']!r}, no filter of Pillow")
    for key, field in (("image_mean", "mean"), ("image_std", "std")):
        channels = config.get(key) or getattr(cls, field)
        numbers = isinstance(channels, list | tuple) and all(isinstance(x, int | float) for x in channels)
        if not numbers or len(channels) != 3:
            raise UnsupportedModel(f"{file}: {key} is {channels!r}, not three numbers")
        fields[field] = tuple(map(float, channels))
    if fields["min_pixels"] > fields["max_pixels"]:
        raise UnsupportedModel(f"{file}: min_pixels {fields['min_pixels']} is above max_pixels {fields['max_pixels']}")
    if not all(fields["std"]):
        raise UnsupportedModel(f"{file}: image_std has a zero")
    return fields


def read_configs(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a checkpoint's image and video processor, from the files that transformers reads, in its order.

    Newer checkpoints keep both in `processor_config.json`; a missing video processor is the image processor's file again.
    Raises UnsupportedModel where there is none, or no JSON object in it.
    """
    whole = _read(folder / "processor_config.json")
    file = _read(folder / "preprocessor_config.json")
    image = whole.get("image_processor") or file
    video = whole.get("video_processor") or _read(folder / "video_preprocessor_config.json") or file or image
    if not isinstance(image, dict) or not isinstance(video, dict) or not image:
        raise UnsupportedModel(f"{folder}: no preprocessor_config.json says how images are prepared")
    return image, video


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{path}: not a JSON object")
    return found
