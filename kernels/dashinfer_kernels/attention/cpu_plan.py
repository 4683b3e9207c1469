"""What the CPU path works out once a step: which cache rows each piece of attention reads, and its mask.

Knows the batch and sizes, never a key or a value. A *cache row* is one KV head's tile of one block, so the cache is
[blocks * num_kv_heads, block_size * head_dim] and one `index_select` of rows in (sequence, head, block) order yields a dense
[sequences * num_kv_heads, tokens, head_dim].
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
# A tile of up to this many scores a head is computed with them in memory, which is faster while they fit into the cache.
SCORES_IN_MEMORY = 256 * 512
KEYS_IN_MEMORY = 1024
# Softcapped scores are materialised in float32, so their tiles are smaller.
SOFTCAP_TILE = 64


@dataclass
class DecodeGroup:
    """Sequences of one token each that are computed by the same calls."""

    order: Tensor | None  # [sequences] int64, their token rows; None: all decoding sequences in order
    rows: Tensor  # [sequences * num_kv_heads * blocks] int64, cache rows
    begin: int  # of a group of one: the visible part of the gathered tokens is [begin, end)
    end: int
    bias: Tensor  # [sequences * num_kv_heads, 1, width], 0 where visible and -inf elsewhere
    sequences: int
    buffers: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Gathered tokens a sequence, padding included."""
        return self.bias.shape[2]

    def buffer(self, dtype: torch.dtype, block_elements: int) -> Tensor:
        """[len(rows), block_elements] to gather into: one a type, so that layers share memory that is mapped and warm."""
        held = self.buffers.get(dtype)
        if held is None or held.shape[1] != block_elements:
            held = self.buffers[dtype] = torch.empty(self.rows.shape[0], block_elements, dtype=dtype)
        return held


@dataclass
class Tile:
    """Queries that see the same span of keys, apart from the mask."""

    queries: slice  # rows of q
    keys: slice  # of the gathered tokens
    mask: Tensor | None  # [queries, keys] additive; None: plain causal from the first key on
    bias: Tensor | None = None  # [queries, keys] float32 additive, in place of `mask`: a tile with its scores in memory


@dataclass
class PrefillSequence:
    rows: Tensor  # [num_kv_heads * blocks] int64, cache rows
    tiles: list[Tile]


@dataclass
class Plan:
    decodes: list[DecodeGroup]
    prefills: list[PrefillSequence]


def make_plan(
    batch: PagedBatch,
    num_kv_heads: int,
    window: int | None,
    *,
    decode_dtype: torch.dtype,
    prefill_dtype: torch.dtype,
    softcap: bool,
) -> Plan:
    """Plan one step for layers of one window size. The types are those of the masks."""
    context = batch.host_starts + batch.host_lengths
    # The first position that any query of the sequence sees, and from it the first block that is read.
    visible = np.zeros_like(context) if window is None else np.maximum(batch.host_starts + 1 - window, 0)
    first_block = visible // batch.block_size
    num_blocks = -(-context // batch.block_size) - first_block
    heads = np.arange(num_kv_heads)

    def cache_rows(chosen: np.ndarray, width: int) -> Tensor:
        """Rows of `width` blocks a sequence; a shorter one repeats its first block, which the mask hides."""
        column = np.arange(width)
        column = np.where(column < num_blocks[chosen, None], column, 0) + first_block[chosen, None]
        blocks = batch.host_tables[chosen[:, None], column].astype(np.int64)
        return torch.from_numpy((blocks[:, None, :] * num_kv_heads + heads[:, None]).reshape(-1))

    decodes = []
    for group in _group(num_blocks[: batch.num_decodes], batch.block_size):
        blocks = int(num_blocks[group].max())
        offset = first_block[group] * batch.block_size
        begin, end = (visible[group] - offset)[:, None], (context[group] - offset)[:, None]
        at = np.arange(blocks * batch.block_size)
        hidden = torch.from_numpy((at < begin) | (at >= end))
        bias = torch.zeros(hidden.shape, dtype=decode_dtype).masked_fill_(hidden, -torch.inf)
        decodes.append(
            DecodeGroup(
                order=torch.from_numpy(group) if len(group) < batch.num_decodes or (np.diff(group) < 0).any() else None,
                rows=cache_rows(group, blocks),
                begin=int(begin[0, 0]),
                end=int(end[0, 0]),
                bias=bias.repeat_interleave(num_kv_heads, 0).unsqueeze(1),
                sequences=len(group),
            )
        )

    prefilling = np.arange(batch.num_decodes, batch.num_sequences)
    step = SOFTCAP_TILE if softcap else TILE
    spans = []
    query_starts = np.concatenate(([0], np.cumsum(batch.host_lengths)))
    for sequence in prefilling:
        start, length = int(batch.host_starts[sequence]), int(batch.host_lengths[sequence])
        row, offset = int(query_starts[sequence]), int(first_block[sequence]) * batch.block_size
        if start == 0 and not softcap and (window is None or length <= window):
            spans.append([(slice(row, row + length), slice(0, length), True)])
            continue
        tiles = []
        for low in range(0, length, step):
            high = min(length, low + step)
            oldest = 0 if window is None else max(0, start + low + 1 - window)
            tiles.append((slice(row + low, row + high), slice(oldest - offset, start + high - offset), False))
        spans.append(tiles)
    in_memory = decode_dtype == torch.float32 and prefill_dtype != torch.float16 and not softcap

    def is_small(queries: slice, keys: slice) -> bool:
        scores = _length(queries) * _length(keys)
        return in_memory and scores <= SCORES_IN_MEMORY and _length(keys) <= KEYS_IN_MEMORY

    tiles = [tile for sequence in spans for tile in sequence]
    small = _Masks([tile[:2] for tile in tiles if is_small(*tile[:2])], window, decode_dtype)
    large = _Masks([tile[:2] for tile in tiles if not (tile[2] or is_small(*tile[:2]))], window, prefill_dtype)

    def make_tile(queries: slice, keys: slice, causal: bool) -> Tile:
        if is_small(queries, keys):
            return Tile(queries, keys, None, small.of(queries, keys))
        return Tile(queries, keys, None if causal else large.of(queries, keys))

    prefills = [
        PrefillSequence(
            rows=cache_rows(prefilling[i : i + 1], int(num_blocks[sequence])),
            tiles=[make_tile(*tile) for tile in spans[i]],
        )
        for i, sequence in enumerate(prefilling)
    ]
    return Plan(decodes, prefills)


def _group(num_blocks: np.ndarray, block_size: int) -> list[np.ndarray]:
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
