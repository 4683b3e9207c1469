"""Attention over the paged cache on CPU.

Decoding sequences are computed together: one gather lays the keys of all of them out densely (its copy stays in the processor's
cache, so it costs less than the read from memory that attention needs anyway), and two batched products do the rest. Reading
blocks in place saves nothing at a few hundred tokens a sequence, and would depend on which blocks a sequence happens to hold.
Prefilling sequences are computed one by one with `scaled_dot_product_attention`.

Scores are float32 whatever the cache holds, which costs a quarter more than 16-bit ones: real models reach scores of 40, and
rounding one of those to bfloat16 changes its weight by up to 13 per cent. float16 is widened for values too, since few CPUs
multiply it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.attention.cpu_plan import DecodeGroup, PrefillSequence, make_plan

# A single sequence of up to this many visible tokens takes the fused operator, which is fewer calls; it has no parallelism
# over the context, so a longer one does not.
_FUSED_DECODE = 512
# Up to this many gathered tokens, widened values stay in the processor's cache and the float32 product is the faster one.
_WIDE_VALUES = 1024


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = key_cache.shape[1]
    key = (num_kv_heads, window, q.dtype, softcap is None)
    plan = batch.plans.get(key)
    if plan is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        prefill = _prefill_dtype(q.dtype, softcap)
        plan = make_plan(batch, num_kv_heads, window, decode_dtype=wide, prefill_dtype=prefill, softcap=softcap is not None)
        batch.plans[key] = plan
    keys, values = key_cache.view(-1, batch.block_size * head_dim), value_cache.view(-1, batch.block_size * head_dim)

    if len(plan.decodes) == 1 and not plan.prefills and plan.decodes[0].order is None:
        return _decode(q, keys, values, plan.decodes[0], num_kv_heads, scale, softcap)
    out = torch.empty(q.shape[0], num_heads * head_dim, dtype=q.dtype)
    for group in plan.decodes:
        order = slice(0, batch.num_decodes) if group.order is None else group.order
        out[order] = _decode(q[order], keys, values, group, num_kv_heads, scale, softcap)
    for sequence in plan.prefills:
        _prefill(q, keys, values, sequence, out, num_kv_heads, scale, softcap)
    return out


def _prefill_dtype(dtype: torch.dtype, softcap: float | None) -> torch.dtype:
    """What prefill multiplies in. The fused operator keeps its scores wide by itself, softcapped ones are ours."""
    keep = dtype != torch.float16 and softcap is None
    return dtype if keep else torch.promote_types(dtype, torch.float32)


def _decode(
    q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, num_kv_heads: int, scale: float, softcap: float | None
) -> Tensor:
    """[sequences, num_heads * head_dim] for one query a sequence."""
    sequences, _, head_dim = q.shape
    if sequences == 1 and softcap is None and q.dtype != torch.float16 and group.end - group.begin <= _FUSED_DECODE:
        k, v = (
            cache.index_select(0, group.rows).view(1, num_kv_heads, -1, head_dim)[:, :, group.begin : group.end]
            for cache in (keys, values)
        )
        rows = q.reshape(1, num_kv_heads, -1, head_dim)
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).view(1, -1)

    out = _decode_products(q, keys, values, group, num_kv_heads, scale, softcap, clean=False)
    # Hidden slots have weight zero, and zero times whatever they hold is zero unless that is not finite. Looking at the
    # result is cheaper than wiping those slots every time.
    if not math.isfinite(out.sum(dtype=torch.promote_types(q.dtype, torch.float32)).item()):
        out = _decode_products(q, keys, values, group, num_kv_heads, scale, softcap, clean=True)
    return out


def _decode_products(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group: DecodeGroup,
    num_kv_heads: int,
    scale: float,
    softcap: float | None,
    clean: bool,
) -> Tensor:
    sequences, num_heads, head_dim = q.shape
    batches, wide = sequences * num_kv_heads, group.bias.dtype
    hidden = group.bias.transpose(1, 2) != 0 if clean else None

    def gathered(cache: Tensor, dtype: torch.dtype) -> Tensor:
        """[batches, width, head_dim]; valid until the next call."""
        dense = torch.index_select(cache, 0, group.rows, out=group.buffer(cache.dtype, cache.shape[1]))
        if dtype != cache.dtype:
            dense = group.buffer(dtype, cache.shape[1]).copy_(dense)
        dense = dense.view(batches, group.width, head_dim)
        return dense if hidden is None else dense.masked_fill_(hidden, 0)

    rows = q.reshape(batches, num_heads // num_kv_heads, head_dim).to(wide)
    scores = torch.bmm(rows, gathered(keys, wide).transpose(1, 2))
    if softcap is None:
        torch.add(group.bias, scores, alpha=scale, out=scores)
    else:
        scores.mul_(scale / softcap).tanh_().mul_(softcap).add_(group.bias)
    widen = q.dtype == torch.float16 or sequences * group.width <= _WIDE_VALUES
    product = wide if widen else q.dtype
    weights = torch.softmax(scores, -1).to(product)
    return torch.bmm(weights, gathered(values, product)).view(sequences, -1).to(q.dtype)


def _prefill(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: PrefillSequence,
    out: Tensor,
    num_kv_heads: int,
    scale: float,
    softcap: float | None,
) -> None:
    """Write the sequence's rows of `out`, [tokens, num_heads * head_dim]."""
    num_heads, head_dim = q.shape[1:]
    product = _prefill_dtype(q.dtype, softcap)
    k, v = (cache.index_select(0, sequence.rows).view(1, num_kv_heads, -1, head_dim).to(product) for cache in (keys, values))
    for tile in sequence.tiles:
        if tile.bias is not None:
            out[tile.queries] = _prefill_in_memory(q[tile.queries], k[0, :, tile.keys], v[0, :, tile.keys], tile.bias, scale)
            continue
        queries = q[tile.queries].to(product).transpose(0, 1).unsqueeze(0)
        seen_k, seen_v = k[:, :, tile.keys], v[:, :, tile.keys]
        if softcap is None:
            attended = F.scaled_dot_product_attention(
                queries, seen_k, seen_v, attn_mask=tile.mask, is_causal=tile.mask is None, scale=scale, enable_gqa=True
            )
        else:
            assert tile.mask is not None
            rows = queries.reshape(num_kv_heads, -1, head_dim)
            scores = torch.bmm(rows, seen_k[0].transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap)
            scores.view(num_heads, -1, scores.shape[-1]).add_(tile.mask)
            attended = torch.bmm(torch.softmax(scores, -1), seen_v[0]).view(1, num_heads, -1, head_dim)
        out[tile.queries] = attended.squeeze(0).transpose(0, 1).reshape(-1, num_heads * head_dim).to(out.dtype)


def _prefill_in_memory(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Two products with their scores in memory: a third faster than the fused operator while the scores fit into the cache.

    q [tokens, num_heads, head_dim], k and v [num_kv_heads, keys, head_dim], bias [tokens, keys] float32; returns
    [tokens, num_heads * head_dim].
    """
    shared = q.shape[1] // k.shape[0]
    rows = q.to(bias.dtype).transpose(0, 1)
    scores = torch.bmm(rows, k.to(bias.dtype).repeat_interleave(shared, 0).transpose(1, 2))
    weights = torch.softmax(torch.add(bias, scores, alpha=scale, out=scores), -1).to(v.dtype)
    return torch.bmm(weights, v.repeat_interleave(shared, 0)).transpose(0, 1).reshape(q.shape[0], -1)
