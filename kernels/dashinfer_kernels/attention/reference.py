"""Definition of attention over the paged cache: one sequence and one dense score matrix at a time, in at least float32."""

import torch
from torch import Tensor

from dashinfer_kernels.attention.batch import PagedBatch


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[2:4]
    out = torch.empty(q.shape[0], num_heads * head_dim, dtype=q.dtype, device=q.device)
    begin = 0
    for row, (start, length) in enumerate(zip(batch.host_starts.tolist(), batch.host_lengths.tolist(), strict=True)):
        context = start + length
        blocks = batch.block_tables[row, : -(-context // block_size)].long()
        k, v = (
            tiles.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :context]
            for tiles in _dequantise(kv_cache, kv_scales, blocks, wide).unbind(1)
        )
        queries = q[begin : begin + length].to(wide).view(length, num_kv_heads, -1, head_dim)
        scores = torch.einsum("lhgd,htd->hglt", queries, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(start, context, device=q.device).unsqueeze(1)
        seen = torch.arange(context, device=q.device).unsqueeze(0)
        hidden = seen > at
        if window is not None:
            hidden |= seen <= at - window
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        out[begin : begin + length] = torch.einsum("hglt,htd->lhgd", weights, v).reshape(length, -1).to(q.dtype)
        begin += length
    return out


def _dequantise(kv_cache: Tensor, kv_scales: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[blocks, 2, num_kv_heads, block_size, head_dim], the values that the cache stands for."""
    # Indexing does not know float8.
    held = kv_cache.view(torch.uint8)[blocks].view(kv_cache.dtype) if kv_cache.dtype.itemsize == 1 else kv_cache[blocks]
    if kv_scales is None:
        return held.to(dtype)
    return held.to(dtype) * kv_scales[blocks].to(dtype).unsqueeze(-1)
