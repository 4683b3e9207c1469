"""Rotation and cache write on CPU: queries and keys together, in float32, with as few torch calls as it takes.

At one token the cost is the number of calls and not the arithmetic. So both halves are multiplied by the cosines, and the
swapped halves by the signed sines, in one call each; the cache is written through one indexed store for keys and one for
values; and what depends on the step alone is kept from one layer to the next.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Step:
    """What every layer of a step shares. It is found again by the identity of the tensors it was made from."""

    positions: Tensor
    cos_sin: Tensor
    slot_mapping: Tensor
    block_size: int
    cos: Tensor  # [tokens, 1, 1, rotary_dim / 2]
    sin: Tensor  # [tokens, 1, 2, rotary_dim / 2], negative for the first half
    where: tuple[Tensor, Tensor]  # block and offset of each token

    @classmethod
    def make(cls, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor, block_size: int) -> "_Step":
        cos, sin = cos_sin.index_select(0, positions)[:, None, None].chunk(2, -1)
        where = (slot_mapping // block_size, slot_mapping % block_size)
        return cls(positions, cos_sin, slot_mapping, block_size, cos, torch.cat((-sin, sin), 2), where)

    def serves(self, positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor, block_size: int) -> bool:
        same = self.positions is positions and self.cos_sin is cos_sin and self.slot_mapping is slot_mapping
        return same and self.block_size == block_size


_last: _Step | None = None


def _step(positions: Tensor, cos_sin: Tensor, slot_mapping: Tensor, block_size: int) -> _Step:
    global _last
    step = _last
    if step is None or not step.serves(positions, cos_sin, slot_mapping, block_size):
        step = _last = _Step.make(positions, cos_sin, slot_mapping, block_size)
    return step


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
    tokens, rotary_dim, num_rotated = qkv.shape[0], cos_sin.shape[1], num_heads + num_kv_heads
    step = _step(positions, cos_sin, slot_mapping, key_cache.shape[2])
    heads = qkv.view(tokens, num_rotated + num_kv_heads, head_dim)
    wide = heads[:, :num_rotated].to(torch.promote_types(qkv.dtype, torch.float32))
    if q_norm is not None and k_norm is not None:
        wide = F.rms_norm(wide, (head_dim,), None, eps)
        wide[:, :num_heads].mul_(q_norm)
        wide[:, num_heads:].mul_(k_norm)

    turning = wide if rotary_dim == head_dim else wide[..., :rotary_dim]
    halves = turning.unflatten(-1, (2, rotary_dim // 2))
    turned = torch.mul(halves, step.cos).addcmul_(halves.flip(2), step.sin)
    if rotary_dim == head_dim:
        out = turned.to(qkv.dtype).view(tokens, num_rotated, head_dim)
    else:
        out = torch.cat((turned.flatten(-2), wide[..., rotary_dim:]), -1).to(qkv.dtype)

    key_cache.transpose(1, 2).index_put_(step.where, out[:, num_heads:].to(key_cache.dtype))
    value_cache.transpose(1, 2).index_put_(step.where, heads[:, num_rotated:].to(value_cache.dtype))
    return out[:, :num_heads]
