"""What the CPU path works out once a step: which cache rows each piece of attention reads, and its mask.

Knows the batch and sizes, never a key or a value. A *cache row* is one KV head's tile of one block, keys or values, so the
cache is [blocks * 2 * num_kv_heads, block_size * head_dim] and one `index_select` of rows in (sequence, head, block) order
yields a dense [sequences * num_kv_heads, tokens, head_dim].
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dashinfer_kernels.attention.batch import PagedBatch

# Decoding sequences of unequal length share a call and are padded to the longest. A call of its own costs as much time as
# reading about this many padded tokens does.
_PADDING_TOKENS = 1024
# Tokens gathered at once (over all sequences of a call): bounds the workspace at 25 MB for 3 KV heads of 64 in bf16.
_GROUP_TOKENS = 32768
# Queries of a long masked prefill are computed in tiles of this many, so that the mask stays small.
TILE = 256
# Up to this many scores a head, computing them in memory is faster than the fused operator, since they fit into the cache.
SCORES_IN_MEMORY = 256 * 512
KEYS_IN_MEMORY = 1024
# Short prefills share a call up to this many scores a head, padded ones included, of which they may waste a quarter.
_GROUP_SCORES = 256 * 1024
# Softcapped scores are materialised in float32, so their tiles are smaller.
SOFTCAP_TILE = 64


@dataclass
class Group:
    """Sequences of equally many queries that are computed by the same calls, with their scores in memory."""

    tokens: slice | Tensor  # rows of q, [sequences * queries]; a shorter sequence repeats its last one
    kept: tuple[Tensor, Tensor] | None  # where sequences repeat rows: the results to keep, and the rows of q they belong to
    rows: Tensor  # [2 * sequences * num_kv_heads * blocks] int64, cache rows of the keys, then of the values
    bias: Tensor  # [sequences, 1, queries, width], 0 where visible and -inf elsewhere
    begin: int  # of a group of one: the tokens in [begin, end) are visible to its last query
    end: int
    buffers: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def sequences(self) -> int:
        return self.bias.shape[0]

    @property
    def queries(self) -> int:
        """Of each sequence, padding included."""
        return self.bias.shape[2]

    @property
    def width(self) -> int:
        """Gathered tokens a sequence, padding included."""
        return self.bias.shape[3]

    def buffer(self, dtype: torch.dtype, rows: int, block_elements: int) -> Tensor:
        """[rows, block_elements] to gather into: one a type and size, so that layers share memory that is mapped and warm."""
        held = self.buffers.get((dtype, rows))
        if held is None or held.shape[1] != block_elements:
            held = self.buffers[dtype, rows] = torch.empty(rows, block_elements, dtype=dtype)
        return held


@dataclass
class Tile:
    """Queries that see the same span of keys, apart from the mask."""

    queries: slice  # rows of q
    keys: slice  # of the gathered tokens
    mask: Tensor | None  # [queries, keys] additive; None: plain causal from the first key on


@dataclass
class LongPrefill:
    """One sequence whose scores do not fit into the cache."""

    rows: Tensor  # [2, num_kv_heads * blocks] int64, cache rows of keys and values
    tiles: list[Tile]


@dataclass
class Plan:
    groups: list[Group]
    prefills: list[LongPrefill]


class _Layout:
    """Where each sequence's visible keys are."""

    def __init__(self, batch: PagedBatch, num_kv_heads: int, window: int | None) -> None:
        self.starts, self.lengths, self.window = batch.host_starts, batch.host_lengths, window
        self.block_size = batch.block_size
        self.context = batch.host_starts + batch.host_lengths
        self.query_starts = np.cumsum(batch.host_lengths) - batch.host_lengths
        # The first position that any query of the sequence sees, and from it the first block that is read.
        oldest = np.zeros_like(self.context) if window is None else np.maximum(batch.host_starts + 1 - window, 0)
        self.first_block = oldest // batch.block_size
        self.num_blocks = -(-self.context // batch.block_size) - self.first_block
        self.offset = self.first_block * batch.block_size  # position of the first gathered token
        self._tables = batch.host_tables
        self._heads = np.arange(num_kv_heads)

    def cache_rows(self, chosen: np.ndarray, width: int) -> Tensor:
        """Rows of `width` blocks a sequence, [2, sequences * heads * width]; a shorter one repeats its first block, which the
        mask hides."""
        column = np.arange(width)
        column = np.where(column < self.num_blocks[chosen, None], column, 0) + self.first_block[chosen, None]
        blocks = self._tables[chosen[:, None], column].astype(np.int64)
        heads = len(self._heads)
        keys = (blocks[:, None, :] * (2 * heads) + self._heads[:, None]).reshape(-1)
        return torch.from_numpy(np.stack((keys, keys + heads)))

    def group(self, chosen: np.ndarray, dtype: torch.dtype) -> Group:
        """All queries of the chosen sequences."""
        queries, blocks = int(self.lengths[chosen].max()), int(self.num_blocks[chosen].max())
        query = np.minimum(np.arange(queries), self.lengths[chosen, None] - 1)
        at = (self.starts[chosen, None] + query)[:, :, None]
        seen = (self.offset[chosen, None] + np.arange(blocks * self.block_size))[:, None]
        hidden = seen > at
        if self.window is not None:
            hidden |= seen <= at - self.window
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
        tokens = (self.query_starts[chosen, None] + query).reshape(-1)
        in_order = (np.diff(tokens) == 1).all()
        kept = None
        if (self.lengths[chosen] < queries).any():
            real = np.flatnonzero(np.arange(queries) < self.lengths[chosen, None])
            kept = (torch.from_numpy(real), torch.from_numpy(tokens[real]))
        end = int(self.context[chosen[0]] - self.offset[chosen[0]])
        return Group(
            tokens=slice(int(tokens[0]), int(tokens[-1]) + 1) if in_order else torch.from_numpy(tokens),
            kept=kept,
            rows=self.cache_rows(chosen, blocks).view(-1),
            bias=bias.unsqueeze(1),
            begin=0 if self.window is None else max(0, end - self.window),
            end=end,
        )


def make_plan(
    batch: PagedBatch,
    num_kv_heads: int,
    window: int | None,
    *,
    score_dtype: torch.dtype,
    prefill_dtype: torch.dtype,
    softcap: bool,
    decodes: bool = True,
) -> Plan:
    """Plan one step for layers of one window size, with or without decoding sequences. The types are those of the groups' masks
    and of long prefills' masks."""
    layout = _Layout(batch, num_kv_heads, window)
    decoding = layout.num_blocks[: batch.num_decodes if decodes else 0]
    groups = [layout.group(chosen, score_dtype) for chosen in _group_decodes(decoding, batch.block_size)]
    prefilling = np.arange(batch.num_decodes, batch.num_sequences)
    keys = layout.num_blocks[prefilling] * batch.block_size
    short = (layout.lengths[prefilling] * keys <= SCORES_IN_MEMORY) & (keys <= KEYS_IN_MEMORY)
    groups += [
        layout.group(prefilling[short][chosen], score_dtype)
        for chosen in _group_prefills(layout.lengths[prefilling[short]], keys[short])
    ]
    return Plan(groups, _long_prefills(layout, prefilling[~short], window, prefill_dtype, SOFTCAP_TILE if softcap else TILE))


def _group_decodes(num_blocks: np.ndarray, block_size: int) -> list[np.ndarray]:
    """Sequences to compute together, given how many blocks each reads: indices, in order if one group can hold them all."""
    if len(num_blocks) == 0:
        return []
    longest = int(num_blocks.max())
    limit = max(1, _GROUP_TOKENS // block_size)
    if longest * len(num_blocks) <= limit and (longest * len(num_blocks) - num_blocks.sum()) * block_size <= _PADDING_TOKENS:
        return [np.arange(len(num_blocks))]
    groups: list[list[int]] = []
    padding = 0
    for index in np.argsort(-num_blocks, kind="stable").tolist():
        if groups:
            top = int(num_blocks[groups[-1][0]])
            padding += (top - int(num_blocks[index])) * block_size
            if padding <= _PADDING_TOKENS and top * (len(groups[-1]) + 1) <= limit:
                groups[-1].append(index)
                continue
        groups.append([index])
        padding = 0
    return [np.array(group) for group in groups]


def _group_prefills(queries: np.ndarray, keys: np.ndarray) -> list[np.ndarray]:
    """Sequences to compute together, given each one's queries and keys: indices, neighbours in order of length."""
    groups: list[list[int]] = []
    most_queries = most_keys = scores = 0
    for index in np.lexsort((-keys, -queries)).tolist():
        own = int(queries[index] * keys[index])
        if groups:
            wider, count = max(most_keys, int(keys[index])), len(groups[-1]) + 1
            padded = most_queries * wider * count
            if padded <= _GROUP_SCORES and 4 * (scores + own) >= 3 * padded:
                groups[-1].append(index)
                most_keys, scores = wider, scores + own
                continue
        groups.append([index])
        most_queries, most_keys, scores = int(queries[index]), int(keys[index]), own
    return [np.array(group) for group in groups]


def _long_prefills(layout: _Layout, chosen: np.ndarray, window: int | None, dtype: torch.dtype, step: int) -> list[LongPrefill]:
    spans: list[list[tuple[slice, slice, bool]]] = []
    for sequence in chosen:
        start, length = int(layout.starts[sequence]), int(layout.lengths[sequence])
        row, offset = int(layout.query_starts[sequence]), int(layout.offset[sequence])
        if start == 0 and step == TILE and (window is None or length <= window):
            spans.append([(slice(row, row + length), slice(0, length), True)])
            continue
        tiles = []
        for low in range(0, length, step):
            high = min(length, low + step)
            oldest = 0 if window is None else max(0, start + low + 1 - window)
            tiles.append((slice(row + low, row + high), slice(oldest - offset, start + high - offset), False))
        spans.append(tiles)
    masks = _Masks([tile[:2] for tiles in spans for tile in tiles if not tile[2]], window, dtype)
    return [
        LongPrefill(
            rows=layout.cache_rows(np.array([sequence]), int(layout.num_blocks[sequence])),
            tiles=[Tile(queries, keys, None if causal else masks.of(queries, keys)) for queries, keys, causal in tiles],
        )
        for sequence, tiles in zip(chosen, spans, strict=True)
    ]


def _length(span: slice) -> int:
    return span.stop - span.start


class _Masks:
    """One mask that serves every tile it was made for: anchored at its last row and column, since only distances matter."""

    def __init__(self, tiles: list[tuple[slice, slice]], window: int | None, dtype: torch.dtype) -> None:
        self._queries = max((_length(queries) for queries, _ in tiles), default=0)
        self._keys = max((_length(keys) for _, keys in tiles), default=0)
        self._mask = _anchored_mask(self._queries, self._keys, window, dtype)

    def of(self, queries: slice, keys: slice) -> Tensor:
        return self._mask[self._queries - _length(queries) :, self._keys - _length(keys) :]


def _anchored_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[queries, keys] additive; the last query is the last key's own position."""
    back = torch.arange(queries - 1, -1, -1).unsqueeze(1)  # of a query, from the last position
    ago = torch.arange(keys - 1, -1, -1).unsqueeze(0)  # of a key
    hidden = ago < back
    if window is not None:
        hidden |= ago >= back + window
    return torch.zeros(queries, keys, dtype=dtype).masked_fill_(hidden, -torch.inf)
