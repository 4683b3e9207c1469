"""Public functions of RMS normalisation."""

import torch
from torch import Tensor

from dashinfer_kernels.norm import cpu, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Root-mean-square norm of each row.

    Args:
        x: [tokens, hidden].
        weight: [hidden], the type of `x`.
        eps: added to the mean square.
        dtype: of the result; the type of `x` where it is None.

    Returns:
        [tokens, hidden]; computed in at least float32 and rounded once.
    """
    assert weight.shape == x.shape[-1:] and weight.dtype == x.dtype
    return (cpu if x.device.type == "cpu" else reference).rms_norm(x, weight, eps, dtype or x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add to the residual stream, then norm.

    The stream is kept wider than what the layers compute in: each of them adds little to it, and rounding the sum to 16 bits
    every time costs more accuracy than everything else in a 16-bit model together.

    Args:
        x: [tokens, hidden], a layer's output.
        residual: [tokens, hidden], float32 (or float64, in tests); `x` is added to it in place.
        weight: [hidden], the type of `residual`.
        eps: added to the mean square.

    Returns:
        `rms_norm(residual + x)`, [tokens, hidden], the type of `x`.
    """
    assert residual.shape == x.shape and weight.shape == x.shape[-1:] and weight.dtype == residual.dtype
    return (cpu if x.device.type == "cpu" else reference).add_rms_norm(x, residual, weight, eps)
