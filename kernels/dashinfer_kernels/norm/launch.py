"""Public functions of RMS normalisation."""

from functools import cache
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.norm import cpu
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quantize_rows.launch import empty_rows, quantize_rows
from dashinfer_kernels.quantized_rows import QuantizedRows

MAX_HIDDEN = 16384  # elements of a row that the Triton kernel keeps in registers


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, *, quantize: None = None) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, *, quantize: Activations | None
) -> Tensor | QuantizedRows: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, *, quantize: Activations | None = None
) -> Tensor | QuantizedRows:
    """Root-mean-square norm of each row.

    Args:
        x: [..., hidden]; on a GPU [tokens, hidden] with contiguous rows, and hidden is at most `MAX_HIDDEN`.
        weight: [hidden], the type of `x`.
        eps: added to the mean square.
        dtype: of the result; the type of `x` where it is None.
        quantize: to 8 bits instead, row by row; `x` is [tokens, hidden] then. On CPU, what `dtype` can hold of the result is.

    Returns:
        The shape of `x`; computed in at least float32 and rounded once.
    """
    assert weight.shape == x.shape[-1:] and weight.dtype == x.dtype
    if use_triton(x):
        return _launch(x, None, weight, eps, dtype or x.dtype, quantize)
    normed = cpu.rms_norm(x, weight, eps, dtype or x.dtype)
    return normed if quantize is None else quantize_rows(normed, quantize)


@overload
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None, *, quantize: None = None
) -> Tensor: ...
@overload
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    quantize: Activations | None,
) -> Tensor | QuantizedRows: ...
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    quantize: Activations | None = None,
) -> Tensor | QuantizedRows:
    """Add to the residual stream, then norm.

    The stream is kept wider than what the layers compute in: each of them adds little to it, and rounding the sum to 16 bits
    every time costs more accuracy than everything else in a 16-bit model together.

    Args:
        x: [tokens, hidden], a layer's output.
        residual: [tokens, hidden], contiguous, float32 (or float64, in tests on CPU); `x` is added to it in place.
        weight: [hidden], the type of `residual`.
        eps: added to the mean square.
        dtype: of the result; the type of `x` where it is None.
        quantize: the result to 8 bits, row by row. On CPU, what `dtype` can hold of it is.

    Returns:
        `rms_norm(residual + x)`, [tokens, hidden].
    """
    assert residual.shape == x.shape and weight.shape == x.shape[-1:] and weight.dtype == residual.dtype
    if use_triton(x):
        return _launch(x, residual, weight, eps, dtype or x.dtype, quantize)
    normed = cpu.add_rms_norm(x, residual, weight, eps, dtype or x.dtype)
    return normed if quantize is None else quantize_rows(normed, quantize)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, quantize: Activations | None
) -> Tensor | QuantizedRows:
    tokens, hidden = x.shape
    assert hidden <= MAX_HIDDEN and x.stride(1) == 1
    assert residual is None or (residual.dtype == torch.float32 and residual.is_contiguous())
    quantized = None if quantize is None else empty_rows(x, hidden, quantize)
    out = torch.empty(x.shape, dtype=dtype, device=x.device) if quantized is None else quantized.values
    if tokens:
        rows, columns, num_warps = _tile(hidden, quantized is not None)
        _kernels().rms_norm_kernel[(-(-tokens // rows),)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            out_ptr=out,
            scales_ptr=None if quantized is None else quantized.scales,
            tokens=tokens,
            x_stride=x.stride(0),
            eps=eps,
            HIDDEN=hidden,
            BLOCK_TOKENS=rows,
            BLOCK_HIDDEN=columns,
            USE_RESIDUAL=residual is not None,
            USE_SCALES=quantized is not None,
            num_warps=num_warps,
        )
    return out if quantized is None else quantized


@cache
def _tile(hidden: int, quantized: bool) -> tuple[int, int, int]:
    """Rows and columns a program, and its warps: by the row's length alone, so a row's sum does not depend on the batch.

    16 elements a thread keep enough loads in flight; short rows share a program. With 8, what quantising adds still fits into
    the registers.
    """
    columns = 1 << (hidden - 1).bit_length()
    tuned = tuning.lookup("quantized_rms_norm" if quantized else "rms_norm", (hidden,)) or {}
    rows = tuned.get("rows", max(1, 2048 // columns))
    per_thread = 8 if quantized and rows * columns <= 8192 else 16
    most = 16 if per_thread == 16 or torch.version.hip is not None else 32
    return rows, columns, tuned.get("num_warps", min(most, max(1, rows * columns // (32 * per_thread))))


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.norm import kernel

    return kernel
