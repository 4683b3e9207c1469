"""What a tower that is a fixed graph is fed: steps in time in batches of few sizes, and how patches attend, as arrays.

A step attends within itself alone, so that a batch is any set of steps of any images and videos. Attention runs over padded
rows, [sequences, longest], in which a mask of one value a key hides the padding; everything else runs over the patches as they
come. A mask of a value a query and key would take 8 GB for an image of 12 megapixels. Buckets keep the product of sequences and
longest, and with it the memory, the same for many small images and for one large one. Knows no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_layout import Layout

MAX_PATCHES = 65536  # of a step; of 14 * 14 pixels they are --max-pixels' default
HIDDEN = -30000.0  # is added to the scores of padding: a share of 0 in every type, and finite in float16
_LONGEST = (256, 4096)  # patches of a step in all buckets but the last

Step = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class Bucket:
    """Bounds of a batch. Patches are at most `sequences * longest`."""

    shortest: int  # patches of the longest step, at least
    longest: int  # at most
    sequences: int  # steps
    windows: int  # of all steps


@dataclass(frozen=True)
class Batch:
    """Steps that are computed together, and the number of their bucket."""

    bucket: int
    steps: tuple[int, ...]


def buckets(config: VisionConfig, max_patches: int = MAX_PATCHES) -> tuple[Bucket, ...]:
    """For steps of up to `max_patches` patches, from the shortest to the longest."""
    square = config.merge_size**2
    found = []
    shortest = square
    for longest in (*(length for length in _LONGEST if length < max_patches), max_patches):
        found.append(Bucket(shortest, longest, max_patches // longest, _most_windows(config, longest, max_patches)))
        shortest = longest + square - longest % square
    return tuple(found)


def _most_windows(config: VisionConfig, longest: int, max_patches: int) -> int:
    """Room for twice the windows of a square step, and for any single step as narrow as images may be."""
    if config.window is None:
        return 0
    side = config.window * config.merge_size
    aspect = 256  # more than any image's
    height, width = (longest / aspect) ** 0.5, (longest * aspect) ** 0.5
    narrow = (height / side + 2) * (width / side + 2)
    return int(max(2 * max_patches / side**2, narrow))


def batches(config: VisionConfig, steps: Sequence[Step], bounds: Sequence[Bucket]) -> Iterator[Batch]:
    """All steps, those of similar length together. No step is longer than the last bucket's longest."""
    order = sorted(range(len(steps)), key=lambda index: steps[index][0] * steps[index][1])
    chosen: list[int] = []
    bucket = windows = 0
    for index in order:
        patches, added = steps[index][0] * steps[index][1], _windows(config, steps[index])
        full = len(chosen) == bounds[bucket].sequences or windows + added > max(bounds[bucket].windows, added)
        if chosen and (patches > bounds[bucket].longest or full):
            yield Batch(bucket, tuple(chosen))
            chosen, windows = [], 0
        while patches > bounds[bucket].longest:
            bucket += 1
        chosen.append(index)
        windows += added
    if chosen:
        yield Batch(bucket, tuple(chosen))


def _windows(config: VisionConfig, step: Step) -> int:
    if config.window is None:
        return 0
    side = config.window * config.merge_size
    return -(-step[0] // side) * -(-step[1] // side)


@dataclass(frozen=True)
class Padded:
    """Patches as rows of sequences.

    Attributes:
        places: [sequences, longest] int32, the patch at each place; 0 where there is none.
        mask: [sequences, 1, 1, longest] float32, 0 and `HIDDEN`.
        back: [patches] int32, the place of each patch among sequences * longest.
    """

    places: np.ndarray
    mask: np.ndarray
    back: np.ndarray

    @classmethod
    def of(cls, bounds: np.ndarray, order: np.ndarray | None, longest: int | None = None) -> "Padded":
        """
        Args:
            bounds: [sequences + 1], 0 and where each ends among the patches in `order`.
            order: [patches], the patches one sequence after the other; None: as they come.
            longest: of the padded rows; None: that of the longest sequence.
        """
        lengths = np.diff(bounds)
        longest = longest or int(lengths.max())
        filled = np.arange(longest) < lengths[:, None]
        patches = np.arange(bounds[-1]) if order is None else order
        places = np.zeros(filled.shape, np.int32)
        places[filled] = patches
        back = np.empty(len(patches), np.int32)
        back[patches] = np.flatnonzero(filled)
        mask = np.where(filled, np.float32(0), np.float32(HIDDEN))
        return cls(places, mask[:, None, None, :], back)


@dataclass(frozen=True)
class BatchLayout:
    """Where the patches of a batch lie, in the order that they come in.

    Attributes:
        plain: without windows; places in the image and of position embeddings.
        steps: attention within steps.
        windows: attention within windows of the tower's own size; None: it has none.
    """

    plain: Layout
    steps: Padded
    windows: Padded | None

    @classmethod
    def build(cls, config: VisionConfig, steps: Sequence[Step]) -> "BatchLayout":
        grids = [(1, height, width) for height, width in steps]
        plain = Layout.build(grids, config.merge_size, None)
        windows = None
        if config.window is not None:
            square = config.merge_size**2
            turned = Layout.build(grids, config.merge_size, config.window)
            assert turned.order is not None and turned.windows is not None
            order = (turned.order[:, None] * square + np.arange(square)).ravel()
            windows = Padded.of(turned.windows, order, config.window**2 * square)
        return cls(plain, Padded.of(plain.steps, None), windows)
