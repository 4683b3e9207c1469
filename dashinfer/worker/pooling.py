"""`Pooling`: embeddings of prompts, made of the hidden states after the final norm, for the sequences that ask for them.

A prompt may be computed in several steps, so a mean is a running sum for each slot. Nothing is kept of what is not asked for.
"""

import torch
from torch import Tensor

from dashinfer.types import Chunk, Enter, PoolingType
from dashinfer.worker.staging import Download


class Pooling:
    """Knows which slots hold a sequence that asks, and what it has seen of each."""

    def __init__(self) -> None:
        self._asked: dict[int, PoolingType] = {}
        self._sums: dict[int, Tensor] = {}  # [hidden] float32

    def enter(self, enter: Enter) -> None:
        """A sequence takes a slot."""
        self._sums.pop(enter.slot, None)
        if enter.sampling.pooling is None:
            self._asked.pop(enter.slot, None)
        else:
            self._asked[enter.slot] = enter.sampling.pooling

    def wanted(self, chunks: list[Chunk]) -> bool:
        """Whether one of a step's chunks is of a sequence that asks."""
        return bool(self._asked) and any(chunk.slot in self._asked for chunk in chunks)

    def compute(self, chunks: list[Chunk], hidden: Tensor) -> "LaunchedEmbeddings | None":
        """Queue the work on a step. None: no prompt that asks is complete.

        Args:
            hidden: [tokens, hidden size], of the chunks' tokens, one chunk after the other.
        """
        if not self.wanted(chunks):
            return None
        indexes, found, row = [], [], 0
        for index, chunk in enumerate(chunks):
            rows = hidden[row : row + chunk.length]
            row += chunk.length
            pooling = self._asked.get(chunk.slot)
            if pooling == "mean":
                total = rows.sum(0, dtype=torch.float32)
                if (before := self._sums.pop(chunk.slot, None)) is not None:
                    total += before
                if not chunk.sample:
                    self._sums[chunk.slot] = total
                    continue
                found.append(total / (chunk.start + chunk.length))
                indexes.append(index)
            elif pooling == "last" and chunk.sample:
                found.append(rows[-1].float())
                indexes.append(index)
        return LaunchedEmbeddings(indexes, Download([torch.stack(found)])) if found else None


class LaunchedEmbeddings:
    """Embeddings on their way to the host."""

    def __init__(self, indexes: list[int], download: Download) -> None:
        self._indexes, self._download = indexes, download

    def result(self) -> dict[int, bytes]:
        """float32 [hidden] by index of the plan's chunk, once they are there."""
        (rows,) = self._download.wait()
        return {index: row.tobytes() for index, row in zip(self._indexes, rows.numpy(), strict=True)}
