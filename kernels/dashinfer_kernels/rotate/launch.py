"""Public function of the rotation of heads."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.rotate import cpu


def rotate_heads(heads: Tensor, angles: Tensor) -> None:
    """Rotate queries and keys of a vision tower, where nothing is written to a cache.

    Args:
        heads: [tokens, heads, head_dim], overwritten; the heads of a token are contiguous, tokens may lie apart, so that the
            first heads of a fused product will do. head_dim is even.
        angles: [tokens, head_dim] float32, contiguous: of each token the cosines of its head_dim / 2 angles, then the sines.
    """
    tokens, num_heads, head_dim = heads.shape
    assert head_dim % 2 == 0
    assert heads.stride(2) == 1 and heads.stride(1) == head_dim
    assert angles.shape == (tokens, head_dim) and angles.dtype == torch.float32 and angles.is_contiguous()
    if not use_triton(heads):
        cpu.rotate_heads(heads, angles)
    elif tokens:
        rows, half, num_warps = _tile(head_dim)
        _kernels().rotate_heads_kernel[(-(-tokens * num_heads // rows),)](
            heads_ptr=heads,
            angles_ptr=angles,
            tokens=tokens,
            stride=heads.stride(0),
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_ROWS=rows,
            BLOCK_HALF=half,
            num_warps=num_warps,
        )


@cache
def _tile(head_dim: int) -> tuple[int, int, int]:
    """Rows a program, columns of half a head, and warps: 16 elements a thread."""
    half = 1 << (head_dim // 2 - 1).bit_length()
    tuned = tuning.lookup("rotate_heads", (head_dim,)) or {}
    return tuned.get("rows", max(1, 1024 // half)), half, tuned.get("num_warps", 4)


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.rotate import kernel

    return kernel
