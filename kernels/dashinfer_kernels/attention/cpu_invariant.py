"""Attention over the paged cache on CPU whose every query has the same bits however it is batched, chunked or cached.

Positions are cut into tiles of queries and of keys that begin at fixed places, whatever the step computes of them. All products
are between one query tile and one key tile of one KV head, of one size, batched; a query's key tiles are summed in order by an
online softmax (arXiv 1805.02867). Rows of a tile that the step does not compute are filled with others and dropped. Whatever
else is done is exactly rounded, independent of order (a maximum), or of one fixed size (the sum of a row of weights).

What a query does not see adds nothing, to the bit: its weight is zero, and a tile of which nothing is seen leaves the sums as
they are. Queries, keys and values are widened to float32, and short tiles are computed whole, so this takes longer than
`attention.cpu`, above all for prefills.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.attention.cpu_rows import CacheRows

KEY_TILE = 128  # positions; more in larger blocks
_LEAST_ROWS = 8  # of a query tile, over the query heads that share a KV head: fewer are not multiplied faster
# Keys gathered at once, in elements: bounds the workspace of decoding sequences at 48 MB in bfloat16.
_GATHERED = 4 << 20
_LOWEST = -1e30  # below every score, and finite, so that it can be subtracted from itself


@dataclass
class _Round:
    """One key tile of each of some query tiles."""

    tiles: slice  # of the group's query tiles
    rows: Tensor  # [2 * num_kv_heads * key tiles * blocks] int64, cache rows of keys, then of values
    unwritten: Tensor | None  # [key tiles, key_tile, 1], slots that may hold anything
    masked: slice  # those of the round's query tiles that do not see all of their key tile
    hidden: Tensor | None  # [masked, 1, query_tile, key_tile], where a query does not see a key; None: none are masked


@dataclass
class _TileGroup:
    """Query tiles that are computed together: one of each of many sequences, or all of one sequence."""

    queries: Tensor  # [tiles * query_tile] int64, rows of q
    kept: Tensor  # those of them that the step computes
    out: Tensor  # and the rows of q that they are
    shared: bool  # one sequence: a round has one key tile for all its query tiles
    rounds: list[_Round]  # in the order of keys


def paged_attention(
    q: Tensor,
    cache: CacheRows,
    batch: PagedBatch,
    *,
    num_kv_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_heads, head_dim = q.shape[1:]
    key = ("invariant", num_heads, num_kv_heads, head_dim, window)
    groups = batch.plans.get(key)
    if groups is None:
        planner = _Planner(batch, query_tile(num_heads, num_kv_heads), num_kv_heads, head_dim, window)
        groups = batch.plans[key] = planner.groups()
    out = torch.empty(q.shape[0], num_heads * head_dim, dtype=q.dtype)
    scaled = q.to(torch.promote_types(q.dtype, torch.float32)) * scale
    for group in groups:
        out[group.out] = _attend(scaled, cache, group, num_kv_heads, softcap)[group.kept].to(q.dtype)
    return out


def query_tile(num_heads: int, num_kv_heads: int) -> int:
    """Positions in a query tile, a power of two."""
    shared = num_heads // num_kv_heads
    return 1 << (-(-_LEAST_ROWS // shared) - 1).bit_length()


def _attend(q: Tensor, cache: CacheRows, group: _TileGroup, num_kv_heads: int, softcap: float | None) -> Tensor:
    """[tiles * query_tile, num_heads * head_dim], the type of `q`, which is scaled and wide."""
    num_heads, head_dim = q.shape[1:]
    shared, positions = num_heads // num_kv_heads, query_tile(num_heads, num_kv_heads)
    gathered = q.index_select(0, group.queries).view(-1, positions, num_kv_heads, shared, head_dim)
    queries = gathered.permute(2, 0, 3, 1, 4).reshape(num_kv_heads, -1, shared * positions, head_dim)
    peak = torch.full((*queries.shape[:3], 1), _LOWEST, dtype=q.dtype)
    total, out = torch.zeros_like(peak), torch.zeros_like(queries)

    for step in group.rounds:
        key_tiles = 1 if group.shared else step.tiles.stop - step.tiles.start
        dense = cache.gather(step.rows, head_dim, q.dtype).view(2, num_kv_heads, key_tiles, -1, head_dim)
        keys, values = dense
        if step.unwritten is not None:
            values.masked_fill_(step.unwritten, 0)
        scores = _multiply(queries[:, step.tiles], keys.transpose(2, 3))
        if softcap is not None:
            scores.mul_(1 / softcap).tanh_().mul_(softcap)
        if step.hidden is not None:
            some = scores[:, step.masked].unflatten(2, (shared, positions))
            some.masked_fill_(step.hidden, -torch.inf)
        before = peak[:, step.tiles]
        after = torch.maximum(before, scores.amax(-1, keepdim=True))
        shrink = torch.sub(before, after).exp_()
        before.copy_(after)
        weights = scores.sub_(after).exp_()
        total[:, step.tiles].mul_(shrink).add_(weights.sum(-1, keepdim=True))
        out[:, step.tiles].mul_(shrink).add_(_multiply(weights, values))
    by_position = out.div_(total).unflatten(2, (shared, positions)).permute(1, 3, 0, 2, 4)
    return by_position.reshape(len(group.queries), -1)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a [heads, tiles, rows, inner] times b [heads, tiles or 1, inner, columns]: [heads, tiles, rows, columns]."""
    heads, tiles, rows, _ = a.shape
    out = torch.empty(heads, tiles, rows, b.shape[3], dtype=a.dtype)
    if b.shape[1] == tiles:
        _bmm(a.flatten(0, 1), b.flatten(0, 1), out.view(heads * tiles, rows, -1))
    else:
        for head in range(heads):
            _bmm(a[head], b[head].expand(tiles, -1, -1), out[head])
    return out


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """A single product would be taken for a plain one, which is summed otherwise than one of several."""
    if len(a) == 1:
        out.copy_(torch.bmm(a.expand(2, -1, -1), b.expand(2, -1, -1))[:1])
    else:
        torch.bmm(a, b, out=out)


class _Planner:
    """Lays out one step for layers of one window size."""

    def __init__(self, batch: PagedBatch, query_tile: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
        self._starts, self._lengths, self._tables = batch.host_starts, batch.host_lengths, batch.host_tables
        self._context = batch.host_starts + batch.host_lengths
        self._query_starts = np.cumsum(batch.host_lengths) - batch.host_lengths
        self._block_size, self._query_tile, self._window = batch.block_size, query_tile, window
        self._key_tile = max(KEY_TILE, batch.block_size)
        self._heads = np.arange(num_kv_heads)
        self._most_tiles = max(1, _GATHERED // (self._key_tile * num_kv_heads * head_dim))

    def groups(self) -> list[_TileGroup]:
        first, last = self._starts // self._query_tile, (self._context - 1) // self._query_tile
        single = np.flatnonzero(first == last)
        # those with most key tiles first, so that the others leave at the end
        begin, end = self._key_tiles(first[single])
        order = np.argsort(begin - end, kind="stable")
        single = single[order]
        parts = [single[low : low + self._most_tiles] for low in range(0, len(single), self._most_tiles)]
        groups = [self._group(part, first[part], shared=False) for part in parts]
        for sequence in np.flatnonzero(first != last):
            tiles = np.arange(first[sequence], last[sequence] + 1)
            groups.append(self._group(np.full(len(tiles), sequence), tiles, shared=True))
        return groups

    def _key_tiles(self, tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The key tiles [begin, end) that a query tile sees: all of its positions, computed in this step or not."""
        position = tiles * self._query_tile
        oldest = np.zeros_like(position) if self._window is None else np.maximum(position + 1 - self._window, 0)
        return oldest // self._key_tile, position // self._key_tile + 1

    def _group(self, sequences: np.ndarray, tiles: np.ndarray, *, shared: bool) -> _TileGroup:
        """Of query tile `tiles[i]` of sequence `sequences[i]`."""
        positions = tiles[:, None] * self._query_tile + np.arange(self._query_tile)
        index = positions - self._starts[sequences, None]
        length = self._lengths[sequences, None]
        rows = (self._query_starts[sequences, None] + np.clip(index, 0, length - 1)).reshape(-1)
        kept = np.flatnonzero((index >= 0) & (index < length))
        begin, end = self._key_tiles(tiles)
        rounds = []
        for number in range(int(begin.min()), int(end.max())) if shared else range(int((end - begin).max())):
            taking = np.flatnonzero((begin <= number) & (number < end) if shared else number < end - begin)
            taken = slice(int(taking[0]), int(taking[-1]) + 1)
            key_tiles = np.full(len(taking), number) if shared else begin[taken] + number
            rounds.append(self._round(taken, sequences[taken], positions[taken], key_tiles, shared=shared))
        return _TileGroup(torch.from_numpy(rows), torch.from_numpy(kept), torch.from_numpy(rows[kept]), shared, rounds)

    def _round(
        self, taken: slice, sequences: np.ndarray, positions: np.ndarray, key_tiles: np.ndarray, *, shared: bool
    ) -> _Round:
        seen = key_tiles[:, None] * self._key_tile + np.arange(self._key_tile)
        hidden = seen[:, None, :] > positions[:, :, None]
        if self._window is not None:
            hidden |= seen[:, None, :] <= positions[:, :, None] - self._window
        masked = np.flatnonzero(hidden.any((1, 2)))
        span = slice(int(masked[0]), int(masked[-1]) + 1) if len(masked) else slice(0, 0)

        read = slice(0, 1) if shared else slice(None)
        unwritten = seen[read] >= self._context[sequences[read], None]
        return _Round(
            tiles=taken,
            rows=torch.from_numpy(self._cache_rows(sequences[read], key_tiles[read])),
            unwritten=torch.from_numpy(unwritten).unsqueeze(-1) if unwritten.any() else None,
            masked=span,
            hidden=torch.from_numpy(hidden[span]).unsqueeze(1) if len(masked) else None,
        )

    def _cache_rows(self, sequences: np.ndarray, key_tiles: np.ndarray) -> np.ndarray:
        """[2 * heads * tiles * blocks]; a block beyond a sequence's last one is its first one again."""
        blocks = self._key_tile // self._block_size
        column = key_tiles[:, None] * blocks + np.arange(blocks)
        column = np.where(column * self._block_size < self._context[sequences, None], column, 0)
        number = self._tables[sequences[:, None], column].astype(np.int64)
        heads = len(self._heads)
        keys = (number * (2 * heads) + self._heads[:, None, None]).reshape(-1)
        return np.concatenate((keys, keys + heads))
