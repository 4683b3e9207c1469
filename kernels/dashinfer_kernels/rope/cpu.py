"""Rotation and cache write on CPU: queries and keys together, in float32, with as few torch calls as it takes.

At one token the cost is the number of calls and not the arithmetic, so both halves are multiplied by the cosines (and by the
sines) in one call each, and the cache is written through one indexed store for keys and one for values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    tokens = qkv.shape[0]
    rotary_dim = cos_sin.shape[1]
    num_rotated = num_heads + num_kv_heads
    heads = qkv.view(tokens, num_rotated + num_kv_heads, head_dim)
    wide = heads[:, :num_rotated].to(torch.promote_types(qkv.dtype, torch.float32))
    if q_norm is not None and k_norm is not None:
        wide = F.rms_norm(wide, (head_dim,), None, eps)
        wide[:, :num_heads].mul_(q_norm)
        wide[:, num_heads:].mul_(k_norm)

    table = cos_sin.index_select(0, positions).view(tokens, 1, 2, rotary_dim // 2)
    halves = wide[..., :rotary_dim].unflatten(-1, (2, rotary_dim // 2))
    rotated = halves * table[:, :, :1]
    crossed = halves * table[:, :, 1:]
    rotated[:, :, 0].sub_(crossed[:, :, 1])
    rotated[:, :, 1].add_(crossed[:, :, 0])
    if rotary_dim == head_dim:
        out = rotated.view(tokens, num_rotated, head_dim).to(qkv.dtype)
    else:
        out = torch.empty(tokens, num_rotated, head_dim, dtype=qkv.dtype)
        out[..., :rotary_dim] = rotated.flatten(-2)
        out[..., rotary_dim:] = wide[..., rotary_dim:]

    block_size = key_cache.shape[2]
    where = (slot_mapping // block_size, slot_mapping % block_size)
    key_cache.transpose(1, 2).index_put_(where, out[:, num_heads:].to(key_cache.dtype))
    value_cache.transpose(1, 2).index_put_(where, heads[:, num_rotated:].to(value_cache.dtype))
    return out[:, :num_heads]
