"""Attention of a few decoding sequences as one compiled loop, which reads keys and values where they lie in the cache."""

import numpy as np
import torch
from numba import int32, uint16
from torch import Tensor

from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.compiled import array, compiled, exp, narrow, widen


@compiled("int64(" + 14 * "int64, " + "float32)")
def _decode(
    q_ptr,
    cache_ptr,
    tables_ptr,
    contexts_ptr,
    out_ptr,
    sequences,
    q_stride,
    num_heads,
    num_kv_heads,
    head_dim,
    num_blocks,
    block_size,
    table_width,
    window,
    scale,
):
    """Returns how many sequences are done: all, or those before one with a block that its table or the cache does not have."""
    q = array(q_ptr, (sequences, q_stride), uint16)
    cache = array(cache_ptr, (num_blocks, 2, num_kv_heads, block_size, head_dim), uint16)
    tables, contexts = array(tables_ptr, (sequences, table_width), int32), array(contexts_ptr, (sequences,), int32)
    out = array(out_ptr, (sequences, num_heads, head_dim), uint16)
    shared = num_heads // num_kv_heads
    wide, sums = np.empty((shared, head_dim), np.float32), np.empty((shared, head_dim), np.float32)
    scores = np.empty((shared, table_width * block_size), np.float32)
    for sequence in range(sequences):
        end = contexts[sequence]
        begin = max(0, end - window)
        if end > table_width * block_size:
            return sequence
        for column in range(begin // block_size, (end - 1) // block_size + 1):
            if not 0 <= tables[sequence, column] < num_blocks:
                return sequence
        for kv_head in range(num_kv_heads):
            for query in range(shared):
                for i in range(head_dim):
                    wide[query, i] = widen(q[sequence, (kv_head * shared + query) * head_dim + i]) * scale
            for column in range(begin // block_size, (end - 1) // block_size + 1):
                block, first = tables[sequence, column], column * block_size
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
                block, first = tables[sequence, column], column * block_size
                for at in range(max(begin, first), min(end, first + block_size)):
                    for query in range(shared):
                        weight = scores[query, at]
                        for i in range(head_dim):
                            sums[query, i] += weight * widen(cache[block, 1, kv_head, at - first, i])
            for query in range(shared):
                for i in range(head_dim):
                    out[sequence, kv_head * shared + query, i] = narrow(sums[query, i])
    return sequences


def decode(q: Tensor, kv_cache: Tensor, batch: PagedBatch, scale: float, window: int | None) -> Tensor:
    """As `paged_attention` where every sequence has one token. Heads lie one after the other."""
    sequences, num_heads, head_dim = q.shape
    num_blocks, _, num_kv_heads, block_size, _ = kv_cache.shape
    out = torch.empty(sequences, num_heads * head_dim, dtype=q.dtype)
    done = _decode(
        q.data_ptr(),
        kv_cache.data_ptr(),
        batch.block_tables.data_ptr(),
        batch.context_lengths.data_ptr(),
        out.data_ptr(),
        sequences,
        q.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        num_blocks,
        block_size,
        batch.block_tables.shape[1],
        1 << 40 if window is None else window,
        scale,
    )
    if done < sequences:
        raise IndexError(f"sequence {done} has a block outside of its table or of the cache")
    return out
