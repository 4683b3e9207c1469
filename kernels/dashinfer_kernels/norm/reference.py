"""Definition of RMS normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in at least float32, rounded once at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(dtype or x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Adds `x` to `residual` in place, in the type of `residual`, and norms the sum to `dtype`, or the type of `x`."""
    residual += x
    return rms_norm(residual, weight, eps, dtype or x.dtype)
