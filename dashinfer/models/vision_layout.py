"""Where the patches of a step's images lie: places in their steps, the steps and windows that attend within themselves.

Patches come step by step in time, and in a step in squares of `merge_size` patches a side, each of which becomes a token;
squares, and patches in them, come row by row. With windows, tokens are computed in another order, window by window. Knows no
torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dashinfer.models.vision_config import Grid


@dataclass(frozen=True)
class Layout:
    """Several images and videos, one after the other.

    Attributes:
        rows: [patches] int64, each patch's row in its step, in the order of computing; `columns` likewise.
        sizes: [patches, 2] int64, rows and columns of each patch's step.
        steps: [steps + 1] int32, 0 and where each step ends.
        windows: [windows + 1] int32, the same of windows; None: there are none.
        order: [tokens] int64, which token is computed at each place; None: each at its own.
    """

    rows: np.ndarray
    columns: np.ndarray
    sizes: np.ndarray
    steps: np.ndarray
    windows: np.ndarray | None
    order: np.ndarray | None

    @classmethod
    def build(cls, grids: Sequence[Grid], merge_size: int, window: int | None) -> "Layout":
        """
        Args:
            grids: steps, rows and columns of patches of each image or video; rows and columns are multiples of `merge_size`.
            window: tokens of a side of a window; those at the edges are what is left.
        """
        places, sizes, order, steps, windows = [], [], [], [], []
        first = 0
        for count, height, width in grids:
            assert height % merge_size == width % merge_size == 0
            lengths, tokens = _one_step(height // merge_size, width // merge_size, window)
            rows, columns = np.divmod(tokens, width // merge_size)
            inner_rows, inner_columns = np.divmod(np.arange(merge_size**2), merge_size)
            patches = [
                (outer[:, None] * merge_size + inner).ravel() for outer, inner in ((rows, inner_rows), (columns, inner_columns))
            ]
            places.append(np.tile(np.stack(patches), count))
            sizes.append(np.broadcast_to((height, width), (count * height * width, 2)))
            order.append((first + len(tokens) * np.arange(count)[:, None] + tokens).ravel())
            steps += [height * width] * count
            windows.append(np.tile(lengths * merge_size**2, count))
            first += count * len(tokens)
        rows, columns = np.concatenate(places, 1)
        return cls(
            rows=rows,
            columns=columns,
            sizes=np.concatenate(sizes),
            steps=_bounds(np.array(steps)),
            windows=None if window is None else _bounds(np.concatenate(windows)),
            order=None if window is None else np.concatenate(order),
        )

    def position_weights(self, side: int) -> tuple[np.ndarray, np.ndarray]:
        """A square of `side` * `side` embeddings stretched over each step, corner on corner, and interpolated linearly.

        Returns:
            Of each patch the four embeddings around it, [patches, 4] int64, and their shares, [patches, 4] float32.
        """
        axes = []
        for places, sizes in ((self.rows, self.sizes[:, 0]), (self.columns, self.sizes[:, 1])):
            exact = places.astype(np.float32) * np.float32(side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
            low = np.floor(exact)
            share = exact - low
            low = low.astype(np.int64)
            axes.append((np.stack((low, np.minimum(low + 1, side - 1)), 1), np.stack((1 - share, share), 1)))
        (rows, row_shares), (columns, column_shares) = axes
        indices = rows[:, :, None] * side + columns[:, None, :]
        return indices.reshape(-1, 4), (row_shares[:, :, None] * column_shares[:, None, :]).reshape(-1, 4)


def _one_step(height: int, width: int, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each window, and the tokens in the order of computing. Without windows: all, in their own order."""
    tokens = np.arange(height * width)
    if window is None:
        return np.array([len(tokens)]), tokens
    rows, columns = np.divmod(tokens, width)
    windows = rows // window * -(-width // window) + columns // window
    return np.bincount(windows), np.argsort(windows, kind="stable")


def _bounds(lengths: np.ndarray) -> np.ndarray:
    bounds = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=bounds[1:])
    return bounds
