"""The layout of one step's tokens in the paged cache: made once a step, used by every layer.

Owns the arithmetic from (start, length, block table) to positions and slots. Knows nothing of heads, types or how attention
is computed; `plans` is where a device's path keeps what it derives from the batch once a step.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class PagedBatch:
    """Sequences in the order of their tokens, those of one token (decode) first.

    A sequence computes positions [start, start + length) and attends to [0, start + length) through its block table. Tensors
    are on the device, `host_` arrays in host memory. The CPU path reads all of those; the Triton path reads starts and
    lengths, and only where there are sequences of several tokens.
    """

    positions: Tensor  # [tokens] int64
    slot_mapping: Tensor  # [tokens] int64, block * block_size + offset
    query_starts: Tensor  # [sequences + 1] int32, where each sequence's tokens begin
    context_lengths: Tensor  # [sequences] int32, start + length
    block_tables: Tensor  # [sequences, blocks] int32; entries beyond a sequence's context are arbitrary
    num_decodes: int  # leading sequences of one token each
    block_size: int
    host_starts: np.ndarray | None  # [sequences] int64
    host_lengths: np.ndarray | None  # [sequences] int64
    host_tables: np.ndarray | None  # [sequences, blocks] int32
    plans: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        starts: Sequence[int],
        lengths: Sequence[int],
        block_tables: "Sequence[Sequence[int]] | np.ndarray | Tensor",
        *,
        block_size: int,
        device: torch.device | str,
    ) -> "PagedBatch":
        """Lay out one step.

        Args:
            starts: tokens of each sequence that are in the cache already.
            lengths: tokens of each sequence that this step computes, at least 1.
            block_tables: a row of block numbers a sequence, long enough for its context. An int32 array or CPU tensor
                [sequences, max_blocks] is the fast way; what it holds beyond a sequence's context is not looked at. It is
                copied, so the caller may change it afterwards.
            block_size: tokens a block.
            device: where the tensors go.
        """
        first = np.asarray(starts, dtype=np.int64).reshape(-1)
        count = np.asarray(lengths, dtype=np.int64).reshape(-1)
        context = first + count
        sequences = len(first)
        assert len(count) == sequences
        assert (count > 0).all()
        assert (first >= 0).all()
        needed = -(-context // block_size)
        tables = _tables(block_tables, int(needed.max(initial=0)))
        assert len(tables) == sequences

        query_starts = np.zeros(sequences + 1, dtype=np.int64)
        np.cumsum(count, out=query_starts[1:])
        owner = np.repeat(np.arange(sequences), count)
        positions = np.arange(query_starts[-1]) + np.repeat(first - query_starts[:-1], count)
        slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
        longer = np.flatnonzero(count > 1)
        return cls(
            positions=torch.from_numpy(positions).to(device),
            slot_mapping=torch.from_numpy(slots).to(device),
            query_starts=torch.from_numpy(query_starts.astype(np.int32)).to(device),
            context_lengths=torch.from_numpy(context.astype(np.int32)).to(device),
            block_tables=torch.from_numpy(tables).to(device),
            num_decodes=int(longer[0]) if len(longer) else sequences,
            block_size=block_size,
            host_starts=first,
            host_lengths=count,
            host_tables=tables,
        )

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lengths.shape[0]


def _tables(block_tables: "Sequence[Sequence[int]] | np.ndarray | Tensor", width: int) -> np.ndarray:
    """A copy of the first `width` columns as int32; rows of a ragged sequence are filled up with zeros."""
    if isinstance(block_tables, Tensor):
        block_tables = block_tables.numpy()
    if isinstance(block_tables, np.ndarray):
        assert block_tables.ndim == 2
        assert block_tables.shape[1] >= width
        return block_tables[:, :width].astype(np.int32, order="C")
    tables = np.zeros((len(block_tables), width), dtype=np.int32)
    for row, blocks in zip(tables, block_tables, strict=True):
        row[: len(blocks)] = blocks[:width]
    return tables
