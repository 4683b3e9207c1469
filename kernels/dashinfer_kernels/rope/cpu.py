"""Rotation and cache write on CPU: queries and keys together, in float32, with as few torch calls as it takes.

At a few tokens the cost is the number of calls and not the arithmetic, and a compiled loop does it all. Without it both halves
are multiplied by the cosines, and the swapped halves by the signed sines, in one call each; the result goes back to where it
came from, so that keys and values lie together and one indexed store writes both; and what depends on the step alone is kept
from one layer to the next. Deterministic mode multiplies and adds one after the other, since whether torch fuses the two may
change with an element's place.

For a quantised cache all heads are widened at once, and what is stored is rounded from float32, once.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch, loops
from dashinfer_kernels.rope.reference import angles, quantise

_MRope = tuple[tuple[int, int, int] | None, bool]  # sections, and whether they are interleaved


@dataclass(frozen=True)
class _Step:
    """What every layer of a step shares. It is found again by the identity of the tensors it was made from."""

    positions: Tensor
    cos_sin: Tensor
    slot_mapping: Tensor
    block_size: int
    mrope: _MRope
    cos: Tensor  # [tokens, 1, 1, rotary_dim / 2]
    sin: Tensor  # [tokens, 1, 2, rotary_dim / 2], negative for the first half
    where: tuple[Tensor, Tensor]  # block and offset of each token that is written
    written: Tensor | None  # [tokens] bool where some are padding

    @classmethod
    def make(
        cls,
        positions: Tensor,
        cos_sin: Tensor,
        slot_mapping: Tensor,
        block_size: int,
        mrope: _MRope,
    ) -> "_Step":
        turns = cos_sin.index_select(0, positions) if positions.ndim == 1 else angles(positions, cos_sin, *mrope)
        cos, sin = turns[:, None, None].chunk(2, -1)
        written = slot_mapping >= 0
        slots = slot_mapping if written.all() else slot_mapping[written]
        where = (slots // block_size, slots % block_size)
        signed = torch.cat((-sin, sin), 2)
        kept = None if slots is slot_mapping else written
        return cls(positions, cos_sin, slot_mapping, block_size, mrope, cos, signed, where, kept)

    def serves(
        self,
        positions: Tensor,
        cos_sin: Tensor,
        slot_mapping: Tensor,
        block_size: int,
        mrope: _MRope,
    ) -> bool:
        same = self.positions is positions and self.cos_sin is cos_sin and self.slot_mapping is slot_mapping
        return same and self.block_size == block_size and self.mrope == mrope


_last: _Step | None = None


def _step(*inputs: Any) -> _Step:
    """The last step's, or a new one's; takes what `_Step.make` takes."""
    global _last
    step = _last
    if step is None or not step.serves(*inputs):
        step = _last = _Step.make(*inputs)
    return step


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
    kv_scales: Tensor | None,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    if q_norm is None and positions.ndim == 1 and kv_cache.dtype == qkv.dtype and loops.fit(qkv):
        return _loop().rope_kv_write(qkv, positions, cos_sin, kv_cache, slot_mapping, num_heads)
    tokens, rotary_dim, num_rotated = qkv.shape[0], cos_sin.shape[1], num_heads + num_kv_heads
    step = _step(positions, cos_sin, slot_mapping, kv_cache.shape[3], (mrope_section, mrope_interleaved))
    heads = qkv.view(tokens, num_rotated + num_kv_heads, head_dim)
    # where results go: to their places, or to wide heads that are quantised afterwards
    kept = heads if kv_scales is None else heads.to(torch.promote_types(qkv.dtype, torch.float32), copy=True)
    rotated = kept[:, :num_rotated]
    wide = rotated.to(torch.promote_types(qkv.dtype, torch.float32))
    if q_norm is not None and k_norm is not None:
        wide = F.rms_norm(wide, (head_dim,), None, eps)
        wide[:, :num_heads].mul_(q_norm)
        wide[:, num_heads:].mul_(k_norm)
        if rotary_dim < head_dim:
            rotated[..., rotary_dim:].copy_(wide[..., rotary_dim:])

    halves = (wide if rotary_dim == head_dim else wide[..., :rotary_dim]).unflatten(-1, (2, rotary_dim // 2))
    turned = torch.mul(halves, step.cos)
    if dispatch.deterministic:
        turned.add_(halves.flip(2).mul_(step.sin))
    else:
        turned.addcmul_(halves.flip(2), step.sin)
    (rotated if rotary_dim == head_dim else rotated[..., :rotary_dim]).copy_(turned.view(tokens, num_rotated, rotary_dim))

    written = kept[:, num_heads:].view(tokens, 2, num_kv_heads, head_dim)
    if step.written is not None:
        written = written[step.written]
    if kv_scales is None:
        kv_cache.permute(0, 3, 1, 2, 4).index_put_(step.where, written.to(kv_cache.dtype))
        return heads[:, :num_heads]
    codes, scales = quantise(written, kv_cache.dtype)
    # indexed stores know no float8
    kv_cache.view(torch.int8).permute(0, 3, 1, 2, 4).index_put_(step.where, codes.view(torch.int8))
    kv_scales.permute(0, 3, 1, 2).index_put_(step.where, scales.to(kv_scales.dtype))
    return kept[:, :num_heads].to(qkv.dtype)


@cache
def _loop() -> ModuleType:
    from dashinfer_kernels.rope import cpu_loop

    return cpu_loop
