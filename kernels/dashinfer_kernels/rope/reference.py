"""Definition of the rotary embedding (Su et al. 2021, arXiv:2104.09864; halves turn against each other) and the cache write."""

import torch
from torch import Tensor

from dashinfer_kernels.norm import reference as norm


def mrope_axes(mrope_section: tuple[int, int, int], interleaved: bool) -> Tensor:
    """Which position turns each frequency: 0 temporal, 1 height, 2 width.

    Args:
        mrope_section: frequencies of each; together rotary_dim / 2.
        interleaved: frequencies take turns (t, h, w, t, h, w, ...) until height and width have theirs, and the rest is temporal
            (Qwen3-VL); otherwise all temporal ones come first, then height, then width (Qwen2-VL, arXiv:2409.12191).

    Returns:
        [rotary_dim / 2] int64.
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section))
    axes = torch.zeros(sum(mrope_section), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * mrope_section[axis] : 3] = axis
    return axes


def angles(positions: Tensor, cos_sin: Tensor, mrope_section: tuple[int, int, int] | None, interleaved: bool) -> Tensor:
    """[tokens, rotary_dim], each token's cosines and then its sines."""
    if positions.ndim == 1:
        return cos_sin[positions]
    assert mrope_section is not None
    axes = mrope_axes(mrope_section, interleaved).to(positions.device).repeat(2)
    return cos_sin[positions[axes], torch.arange(len(axes), device=positions.device).unsqueeze(1)].T


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` dimensions of each head by its token's angles.

    Args:
        heads: [tokens, heads, head_dim], float32 or float64.
        angles: [tokens, rotary_dim] float32, cosines first.
    """
    cos, sin = angles.to(heads.dtype).unsqueeze(1).chunk(2, -1)
    first, second = heads[..., : angles.shape[1]].chunk(2, -1)
    rest = heads[..., angles.shape[1] :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest of each row becomes the largest of the type.

    Args:
        x: [..., head_dim], float32 or float64.
        dtype: int8 or float8_e4m3fn.

    Returns:
        What is stored, [..., head_dim] `dtype`, and what to multiply it with, [...] the type of `x`, at least 1e-12 over the
        type's largest: a row of zeros has a scale too. Rounded to the nearest, ties to even.
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = x.abs().amax(-1).clamp_min(1e-12) / largest
    stored = x / scale.unsqueeze(-1)
    return (stored.round() if dtype == torch.int8 else stored).to(dtype), scale


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
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float,
    kv_scales: Tensor | None = None,
    mrope_section: tuple[int, int, int] | None = None,
    mrope_interleaved: bool = False,
) -> Tensor:
    """All arithmetic in at least float32, rounded once: to the type of `qkv` for the queries, of the cache for the rest."""
    heads = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
    heads = heads.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = norm.rms_norm(q, q_norm, eps), norm.rms_norm(k, k_norm, eps)
    turns = angles(positions, cos_sin, mrope_section, mrope_interleaved)
    q, k = rotate(q, turns), rotate(k, turns)

    block_size = kv_cache.shape[3]
    kept = slot_mapping >= 0
    where = (slot_mapping[kept] // block_size, slot_mapping[kept] % block_size)
    kv = torch.stack((k, v), 1)[kept]
    if kv_scales is not None:
        kv, scales = quantise(kv, kv_cache.dtype)
        kv_scales.permute(0, 3, 1, 2)[where] = scales.to(kv_scales.dtype)
    kv = kv.to(kv_cache.dtype)
    if kv_cache.dtype.itemsize == 1:  # indexed stores know no float8
        kv, kv_cache = kv.view(torch.uint8), kv_cache.view(torch.uint8)
    kv_cache.permute(0, 3, 1, 2, 4)[where] = kv
    return q.to(qkv.dtype)
