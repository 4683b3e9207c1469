"""What the prompts in the slots show, and where: the embeddings that take the place of tokens, and the positions of tokens
whose places say less.

In a model that sees, text after an image has positions that are its places plus a number, the slot's delta; within the prompt
each token has three of its own. All are below `max_length`, which whoever plans sees to. Knows no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dashinfer.types import Chunk, Enter, MediaSpan


@dataclass(frozen=True)
class Shown:
    """What takes the place of tokens in a step.

    Attributes:
        rows: [count], which of the step's tokens.
        parts: of whose embeddings, from which to which, one after the other: key, begin, end.
    """

    rows: np.ndarray
    parts: list[tuple[bytes, int, int]]


class Placements:
    """Of up to `max_batch` slots with sequences of up to `max_length` tokens.

    Attributes:
        deltas: [max_batch] int32 on the device.
    """

    def __init__(self, max_batch: int, max_length: int, device: torch.device) -> None:
        self.deltas = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self._deltas = np.zeros(max_batch, dtype=np.int64)
        self._spans: list[tuple[MediaSpan, ...]] = [()] * max_batch
        self._positions: list[np.ndarray | None] = [None] * max_batch  # [3, prompt_length]
        self._max_length = max_length

    def enter(self, enter: Enter) -> None:
        """A sequence takes a slot."""
        slot, positions = enter.slot, None
        assert enter.positions or not enter.media
        if enter.positions:
            positions = np.frombuffer(enter.positions, dtype="<i4").reshape(3, enter.prompt_length)
            assert positions.min() >= 0 and max(positions.max(), enter.prompt_length + enter.delta - 1) < self._max_length
        self._spans[slot], self._positions[slot] = enter.media, positions
        if self._deltas[slot] != enter.delta:
            self._deltas[slot] = enter.delta
            self.deltas[slot].fill_(enter.delta)

    def has_positions(self, chunk: Chunk) -> bool:
        """Whether some of a chunk's tokens have positions of their own, rather than their places and the delta."""
        positions = self._positions[chunk.slot]
        return positions is not None and chunk.start < positions.shape[1]

    def positions(self, chunks: Sequence[Chunk], owners: np.ndarray, places: np.ndarray) -> np.ndarray | None:
        """That a step's tokens are rotated by: [tokens] or [3, tokens]; None: their places.

        Args:
            owners: [tokens], the slot of each.
            places: [tokens].
        """
        own = any(map(self.has_positions, chunks))
        if not own and not any(self._deltas[chunk.slot] for chunk in chunks):
            return None
        moved = places + self._deltas[owners]
        if not own:
            return moved
        moved = np.repeat(moved[None], 3, 0)
        row = 0
        for chunk in chunks:
            positions = self._positions[chunk.slot]
            if positions is not None and chunk.start < positions.shape[1]:
                known = positions[:, chunk.start : chunk.start + chunk.length]
                moved[:, row : row + known.shape[1]] = known
            row += chunk.length
        return moved

    def shown(self, chunks: Sequence[Chunk]) -> Shown | None:
        """What a step's chunks show; None: nothing."""
        rows, parts = [], []
        row = 0
        for chunk in chunks:
            for span in self._spans[chunk.slot] if self.has_positions(chunk) else ():
                begin, end = max(span.start, chunk.start), min(span.end, chunk.start + chunk.length)
                if begin < end:
                    rows.append(np.arange(begin, end) + (row - chunk.start))
                    first = span.offset + begin - span.start
                    parts.append((span.key, first, first + end - begin))
            row += chunk.length
        return Shown(np.concatenate(rows), parts) if parts else None
