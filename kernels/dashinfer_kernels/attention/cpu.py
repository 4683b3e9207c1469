"""Attention over the paged cache on CPU.

Decoding sequences are computed together, and so are short prefills: one gather lays the keys and values of all of them out
densely (its copy stays in the processor's cache, so it costs less than the read from memory that attention needs anyway), and
two batched products do the rest. Reading blocks in place saves nothing at a few hundred tokens a sequence, and would depend on
which blocks a sequence happens to hold. Long prefills are computed one by one with `scaled_dot_product_attention`.

Scores are float32 whatever the cache holds, which costs a quarter more than 16-bit ones: real models reach scores of 40, and
rounding one of those to bfloat16 changes its weight by up to 13 per cent. float16 is widened for values too, since few CPUs
multiply it.

Where loops can be compiled, one reads the keys and values of decoding sequences in place instead, without these calls: with two
threads in two thirds of the time, at 16 sequences of 160 tokens as at 32 of 500 or 4 of 3,000.

Codes of a quantised cache are multiplied as they are, and scores and weights with the scales. On one core, with 9 heads over 3
of size 64, milliseconds a layer beside a bfloat16 cache:

    decode    bfloat16    int8     fp8          bfloat16    int8     fp8
    1 x 256      0.084   0.104   0.147   16 x 2048    10.1     8.5    11.6
    1 x 1024      0.30    0.28    0.43   32 x 256      2.4     2.0     3.1
    1 x 2048      0.51    0.51    0.77   32 x 2048    21.2    16.2    22.6
    16 x 256      1.26    1.05    1.58   prefill 512   8.4     8.5     8.7
"""

import math
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch, loops
from dashinfer_kernels.attention import cpu_invariant
from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.attention.cpu_plan import Group, LongPrefill, make_plan
from dashinfer_kernels.attention.cpu_rows import CacheRows

# A single sequence of up to this many visible tokens takes the fused operator, which is fewer calls; it has no parallelism
# over the context, so a longer one does not.
_FUSED_DECODE = 512
# Up to this many gathered tokens, widened values stay in the processor's cache and the float32 product is the faster one.
_WIDE_VALUES = 1024


def paged_attention(
    q: Tensor,
    kv_cache: CacheRows,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    num_heads, head_dim = q.shape[1:]
    out, looped = None, 0
    if softcap is None and batch.num_decodes and _fits_loop(q, kv_cache, batch.num_decodes):
        out, looped = torch.empty(len(q), num_heads * head_dim, dtype=q.dtype), batch.num_decodes
        _loop().decode(q[:looped], kv_cache, batch, out, scale, window)
        if looped == len(q):
            return out
    cache = CacheRows.of(kv_cache, kv_scales)
    if dispatch.deterministic:
        return cpu_invariant.paged_attention(
            q, cache, batch, num_kv_heads=kv_cache.shape[2], scale=scale, window=window, softcap=softcap
        )
    num_kv_heads = kv_cache.shape[2]
    key = (num_kv_heads, window, q.dtype, softcap is None, looped)
    plan = batch.plans.get(key)
    if plan is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        prefill = _prefill_dtype(q.dtype, softcap)
        types = {"score_dtype": wide, "prefill_dtype": prefill}
        plan = make_plan(batch, num_kv_heads, window, **types, softcap=softcap is not None, decodes=not looped)
        batch.plans[key] = plan

    if len(plan.groups) == 1 and not plan.prefills and plan.groups[0].tokens == slice(0, len(q)):
        return _group(q, cache, plan.groups[0], num_kv_heads, scale, softcap)
    if out is None:
        out = torch.empty(len(q), num_heads * head_dim, dtype=q.dtype)
    for group in plan.groups:
        attended = _group(q[group.tokens], cache, group, num_kv_heads, scale, softcap)
        if group.kept is None:
            out[group.tokens] = attended
        else:
            out[group.kept[1]] = attended[group.kept[0]]
    for sequence in plan.prefills:
        _prefill(q, cache, sequence, out, num_kv_heads, scale, softcap)
    return out


def _fits_loop(q: Tensor, kv_cache: Tensor, decodes: int) -> bool:
    return q.dtype == kv_cache.dtype and q.stride()[1:] == (q.shape[2], 1) and loops.take(q.dtype, decodes)


def _prefill_dtype(dtype: torch.dtype, softcap: float | None) -> torch.dtype:
    """What long prefills multiply in. The fused operator keeps its scores wide by itself, softcapped ones are ours."""
    keep = dtype != torch.float16 and softcap is None
    return dtype if keep else torch.promote_types(dtype, torch.float32)


def _group(q: Tensor, cache: CacheRows, group: Group, num_kv_heads: int, scale: float, softcap: float | None) -> Tensor:
    """[tokens, num_heads * head_dim] for the group's queries, [tokens, num_heads, head_dim]."""
    head_dim = q.shape[2]
    fused = len(q) == 1 and softcap is None and q.dtype != torch.float16 and group.end - group.begin <= _FUSED_DECODE
    if fused:
        dtype = q.dtype if cache.scales is None else group.bias.dtype  # narrowing what was just widened is one more call
        kv = cache.gather(group.rows, head_dim, dtype).view(2, 1, num_kv_heads, -1, head_dim)[..., group.begin : group.end, :]
        rows = q.reshape(1, num_kv_heads, -1, head_dim).to(dtype)
        return F.scaled_dot_product_attention(rows, kv[0], kv[1], scale=scale).view(1, -1).to(q.dtype)

    out = _products(q, cache, group, num_kv_heads, scale, softcap, clean=False)
    # Hidden slots have weight zero, and zero times whatever they hold is zero unless that is not finite. Looking at the
    # result is cheaper than wiping those slots every time.
    if not math.isfinite(out.sum(dtype=torch.promote_types(q.dtype, torch.float32)).item()):
        out = _products(q, cache, group, num_kv_heads, scale, softcap, clean=True)
    return out


def _products(
    q: Tensor, cache: CacheRows, group: Group, num_kv_heads: int, scale: float, softcap: float | None, *, clean: bool
) -> Tensor:
    """As `_group`; `clean` wipes what no query of a sequence sees."""
    sequences, queries, width, wide = group.sequences, group.queries, group.width, group.bias.dtype
    num_heads, head_dim = q.shape[1:]
    batches, shared = sequences * num_kv_heads, num_heads // num_kv_heads
    held = cache.held
    dense = torch.index_select(held, 0, group.rows, out=group.buffer(held.dtype, len(group.rows), held.shape[1]))
    scales = None
    if cache.scales is not None:
        scales = cache.gather_scales(group.rows, wide).view(2, sequences, num_kv_heads, 1, 1, width)
    if clean:
        hidden = (group.bias == -torch.inf).all(2).view(1, sequences, 1, width, 1)
        dense.view(2, sequences, num_kv_heads, width, head_dim).masked_fill_(hidden, 0)
        if scales is not None:
            scales.view(2, sequences, num_kv_heads, width, 1).masked_fill_(hidden, 0)
    narrow = q.dtype != torch.float16 and (queries > 1 or sequences * width > _WIDE_VALUES)
    if q.dtype == wide or not narrow:
        dense = dense if held.dtype == wide else cache.widen(dense, group.buffer(wide, *dense.shape))
        keys, values = dense.view(2, batches, width, head_dim)
    else:
        half = len(dense) // 2
        values = dense[half:] if scales is None else cache.widen(dense[half:], group.buffer(q.dtype, half, held.shape[1]))
        values = values.view(batches, width, head_dim)
        keys = cache.widen(dense[:half], group.buffer(wide, half, held.shape[1])).view(batches, width, head_dim)

    if queries == 1:
        rows = q.to(wide).reshape(batches, shared, head_dim)
    else:
        by_head = q.view(sequences, queries, num_kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
        rows = torch.empty(by_head.shape, dtype=wide).copy_(by_head).view(batches, shared * queries, head_dim)
    scores = torch.bmm(rows, keys.transpose(1, 2)).view(sequences, num_heads, queries, width)
    by_head = scores.view(sequences, num_kv_heads, shared, queries, width)
    if scales is not None and softcap is None:
        torch.addcmul(group.bias.unsqueeze(1), by_head, scales[0], value=scale, out=by_head)
    elif softcap is None:
        torch.add(group.bias, scores, alpha=scale, out=scores)
    else:
        if scales is not None:
            by_head.mul_(scales[0])
        scores.mul_(scale / softcap).tanh_().mul_(softcap).add_(group.bias)
    weights = torch.softmax(scores, -1)
    if scales is not None:
        weights.view(by_head.shape).mul_(scales[1])
    out = torch.bmm(weights.to(values.dtype).view(batches, shared * queries, width), values)
    if queries > 1:
        out = out.view(sequences, num_kv_heads, shared, queries, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(sequences * queries, -1).to(q.dtype)


def _prefill(
    q: Tensor, cache: CacheRows, sequence: LongPrefill, out: Tensor, num_kv_heads: int, scale: float, softcap: float | None
) -> None:
    """Write the sequence's rows of `out`, [tokens, num_heads * head_dim]."""
    num_heads, head_dim = q.shape[1:]
    product = _prefill_dtype(q.dtype, softcap)
    k, v = (cache.gather(rows, head_dim, product).view(1, num_kv_heads, -1, head_dim) for rows in sequence.rows)
    for tile in sequence.tiles:
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


@cache
def _loop() -> ModuleType:
    from dashinfer_kernels.attention import cpu_loop

    return cpu_loop
