"""Definition of the rotary embedding (Su et al. 2021, arXiv:2104.09864; halves turn against each other) and the cache write."""

import torch
from torch import Tensor

from dashinfer_kernels.norm import reference as norm


def rotate(heads: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` dimensions of each head by its token's angles.

    Args:
        heads: [tokens, heads, head_dim], float32 or float64.
        positions: [tokens] int64.
        cos_sin: [max_positions, rotary_dim] float32, cosines first.
    """
    cos, sin = cos_sin[positions].to(heads.dtype).unsqueeze(1).chunk(2, -1)
    first, second = heads[..., : cos_sin.shape[1]].chunk(2, -1)
    rest = heads[..., cos_sin.shape[1] :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """All arithmetic in at least float32, rounded once: to the type of `qkv` for the queries, of the cache for the rest."""
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    heads = heads.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = norm.rms_norm(q, q_norm, eps), norm.rms_norm(k, k_norm, eps)
    q, k = rotate(q, positions, cos_sin), rotate(k, positions, cos_sin)
    block_size = kv_cache.shape[3]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    kv_cache[blocks, 0, :, offsets] = k.to(kv_cache.dtype)
    kv_cache[blocks, 1, :, offsets] = v.to(kv_cache.dtype)
    return q.to(qkv.dtype)
