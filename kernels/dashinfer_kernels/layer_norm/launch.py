"""Public functions of layer normalisation."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.layer_norm import cpu

MAX_HIDDEN = 16384  # elements of a row that the Triton kernel keeps in registers


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Layer norm of each row.

    Args:
        x: [..., hidden]; on a GPU [tokens, hidden] with contiguous rows, and hidden is at most `MAX_HIDDEN`.
        weight: [hidden], the type of `x`.
        bias: [hidden], the type of `x`.
        eps: added to the variance.
        dtype: of the result; the type of `x` where it is None.

    Returns:
        The shape of `x`; computed in at least float32 and rounded once.
    """
    assert weight.shape == bias.shape == x.shape[-1:] and weight.dtype == bias.dtype == x.dtype
    if use_triton(x):
        return _launch(x, None, weight, bias, eps, dtype or x.dtype)
    return cpu.layer_norm(x, weight, bias, eps, dtype or x.dtype)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Add to the residual stream, then norm; the stream is kept wide as for `add_rms_norm`.

    Args:
        x: [tokens, hidden], a layer's output.
        residual: [tokens, hidden], contiguous, float32 (or float64, in tests on CPU); `x` is added to it in place.
        weight: [hidden], the type of `residual`.
        bias: [hidden], the type of `residual`.
        eps: added to the variance.

    Returns:
        `layer_norm(residual + x)`, [tokens, hidden], the type of `x`.
    """
    assert residual.shape == x.shape and weight.shape == bias.shape == x.shape[-1:]
    assert weight.dtype == bias.dtype == residual.dtype
    if use_triton(x):
        return _launch(x, residual, weight, bias, eps, x.dtype)
    return cpu.add_layer_norm(x, residual, weight, bias, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    tokens, hidden = x.shape
    assert hidden <= MAX_HIDDEN and x.stride(1) == 1
    assert residual is None or (residual.dtype == torch.float32 and residual.is_contiguous())
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if tokens:
        rows, columns, num_warps = _tile(hidden)
        _kernels().layer_norm_kernel[(-(-tokens // rows),)](
            x_ptr=x,
            residual_ptr=residual,
            weight_ptr=weight,
            bias_ptr=bias,
            out_ptr=out,
            tokens=tokens,
            x_stride=x.stride(0),
            eps=eps,
            HIDDEN=hidden,
            BLOCK_TOKENS=rows,
            BLOCK_HIDDEN=columns,
            USE_RESIDUAL=residual is not None,
            num_warps=num_warps,
        )
    return out


@cache
def _tile(hidden: int) -> tuple[int, int, int]:
    """Rows and columns a program, and its warps: by the row's length alone; 16 elements a thread, and short rows share."""
    columns = 1 << (hidden - 1).bit_length()
    tuned = tuning.lookup("layer_norm", (hidden,)) or {}
    rows = tuned.get("rows", max(1, 2048 // columns))
    return rows, columns, tuned.get("num_warps", min(16, max(1, rows * columns // 512)))


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.layer_norm import kernel

    return kernel
