"""Attention of a few decoding sequences as one compiled loop, which reads keys and values where they lie in the cache."""

import numpy as np
from numba import int32, int64, uint16
from torch import Tensor

from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.compiled import Loop, array, as_float, exp, float_bits, given, narrow, shared, take, widen


@shared
def has_blocks(table, begin, end, block_size, num_blocks):
    """Whether a sequence's tokens in [begin, end) are in its table, and their blocks in the cache."""
    known = end <= len(table) * block_size
    if known:
        for column in range(begin // block_size, (end - 1) // block_size + 1):
            known &= 0 <= table[column] < num_blocks
    return known


@shared
def attend(q, cache, kv_head, table, begin, end, scale, wide, scores, sums, out):
    """Of one token's heads that share a KV head, over the tokens in [begin, end).

    `q` and `out` are [heads, head_dim]; `wide` and `sums` are scratch of that shape in float32, `scores` [heads, tokens].
    """
    (shared, head_dim), block_size = q.shape, cache.shape[3]
    for query in range(shared):
        for i in range(head_dim):
            wide[query, i] = widen(q[query, i]) * scale
    for column in range(begin // block_size, (end - 1) // block_size + 1):
        block, first = table[column], column * block_size
        for at in range(max(begin, first), min(end, first + block_size)):
            for query in range(shared):
                score = np.float32(0)
                for i in range(head_dim):
                    score += wide[query, i] * widen(cache[block, 0, kv_head, at - first, i])
                scores[query, at] = score
    for query in range(shared):
        peak = scores[query, begin]
        for at in range(begin, end):
            peak = max(peak, scores[query, at])
        total = np.float32(0)
        for at in range(begin, end):
            weight = exp(scores[query, at] - peak)
            scores[query, at] = weight
            total += weight
        for at in range(begin, end):
            scores[query, at] /= total
    sums[:] = 0
    for column in range(begin // block_size, (end - 1) // block_size + 1):
        block, first = table[column], column * block_size
        for at in range(max(begin, first), min(end, first + block_size)):
            for query in range(shared):
                weight = scores[query, at]
                for i in range(head_dim):
                    sums[query, i] += weight * widen(cache[block, 1, kv_head, at - first, i])
    for query in range(shared):
        for i in range(head_dim):
            out[query, i] = narrow(sums[query, i])


@Loop
def _decode(work):
    """A task is a KV head of a sequence. Returns a sequence, and one more, with a block that its table or the cache lacks."""
    _, tasks, _, q_ptr, cache_ptr, tables_ptr, contexts_ptr, out_ptr, q_stride, num_heads = given(work, 10)
    num_kv_heads, head_dim, num_blocks, block_size, table_width, window, scale_bits = given(work + 80, 7)
    sequences, shared, scale = tasks // num_kv_heads, num_heads // num_kv_heads, as_float(scale_bits)
    cache = array(cache_ptr, (num_blocks, 2, num_kv_heads, block_size, head_dim), uint16)
    tables, contexts = array(tables_ptr, (sequences, table_width), int32), array(contexts_ptr, (sequences,), int32)
    out = array(out_ptr, (sequences, num_kv_heads, shared, head_dim), uint16)
    wide, sums = np.empty((shared, head_dim), np.float32), np.empty((shared, head_dim), np.float32)
    scores = np.empty((shared, table_width * block_size), np.float32)
    task = take(work)
    while task < tasks:
        sequence, kv_head = task // num_kv_heads, task % num_kv_heads
        end = contexts[sequence]
        begin = max(0, end - window)
        if has_blocks(tables[sequence], begin, end, block_size, num_blocks):
            q = array(q_ptr + 2 * (sequence * q_stride + kv_head * shared * head_dim), (shared, head_dim), uint16)
            attended = out[sequence, kv_head]
            attend(q, cache, kv_head, tables[sequence], begin, end, scale, wide, scores, sums, attended)
        else:
            array(work, (3,), int64)[2] = sequence + 1
        task = take(work)


def decode(q: Tensor, kv_cache: Tensor, batch: PagedBatch, out: Tensor, scale: float, window: int | None) -> None:
    """As `paged_attention` of the batch's decoding sequences, whose queries these are, into the first rows of `out`. Heads lie
    one after the other."""
    sequences, num_heads, head_dim = q.shape
    num_blocks, _, num_kv_heads, block_size, _ = kv_cache.shape
    failed = _decode(
        sequences * num_kv_heads,
        sequences * batch.block_tables.shape[1] * block_size * num_kv_heads * head_dim,
        q.data_ptr(),
        kv_cache.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.context_lengths.data_ptr(),
        out.data_ptr(),
        q.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        num_blocks,
        block_size,
        batch.block_tables.shape[1],
        1 << 40 if window is None else window,
        float_bits(scale),
    )
    if failed:
        raise IndexError(f"sequence {failed - 1} has a block outside of its table or of the cache")
