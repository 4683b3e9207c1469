"""Public function of attention over the paged cache."""

import torch
from torch import Tensor

from dashinfer_kernels import dispatch
from dashinfer_kernels.attention import cpu, decode, prefill
from dashinfer_kernels.attention.batch import PagedBatch


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    batch: PagedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Causal attention of a step's tokens over their sequences' cached keys and values, those of the step included.

    Args:
        q: [tokens, num_heads, head_dim]; num_heads is a multiple of num_kv_heads, and query heads that share a KV head are
            neighbours.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], keys and then values of each block; contiguous, the type
            of `q`, or int8 or float8_e4m3fn. Slots that no position of the batch maps to may hold anything, NaN included.
        batch: the step's layout.
        scale: what scores are multiplied with, usually head_dim ** -0.5.
        window: a token sees the last `window` positions, its own included; None: all.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask; None: unchanged.
        kv_scales: [num_blocks, 2, num_kv_heads, block_size] float32, what an int8 or float8 cache's values are multiplied with,
            one a token and head; None otherwise.

    Returns:
        [tokens, num_heads * head_dim], the type of `q`.
    """
    assert q.ndim == 3
    assert q.shape[0] == batch.num_tokens
    _, two, num_kv_heads, block_size, head_dim = kv_cache.shape
    assert two == 2
    assert q.shape[2] == head_dim
    assert kv_cache.is_contiguous()
    assert q.shape[1] % num_kv_heads == 0
    assert block_size == batch.block_size
    assert (kv_scales is None) == (q.dtype == kv_cache.dtype)
    assert kv_scales is None or kv_scales.shape == kv_cache.shape[:4]
    assert window is None or window > 0
    options = {"scale": scale, "window": window, "softcap": softcap}
    if not dispatch.use_triton(q):
        return cpu.paged_attention(q, kv_cache, batch, **options, kv_scales=kv_scales)
    out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    # a token's sums must not depend on whether it came alone or in a chunk
    if (decodes := 0 if dispatch.deterministic else batch.num_decodes) > 0:
        decode.paged_attention(q[:decodes], kv_cache, batch, out[:decodes], **options, kv_scales=kv_scales)
    if decodes < batch.num_sequences:
        prefill.paged_attention(q, kv_cache, batch, out, **options, kv_scales=kv_scales, first_sequence=decodes)
    return out
