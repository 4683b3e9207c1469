"""RMS normalisation on CPU, in float32: a vectorised sum of squares and two passes over the rows; for a few of them one loop.

`F.rms_norm` is not one operator on CPU but seven; this takes half its time at one row and a fifth at 512. The root of the mean
square plus eps is the hypotenuse of the row's length and a constant, over the root of the size. Its vectorised form may round
otherwise than the one for the last few rows, so deterministic mode takes the root of a sum, which is exactly rounded.
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import dispatch, loops


@cache
def _least_length(size: int, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor((size * eps) ** 0.5, dtype=dtype)


@cache
def _inverse_root(size: int, dtype: torch.dtype) -> Tensor:
    """A tensor, since a Python number makes a call half as long again."""
    return torch.tensor(size**-0.5, dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    size = x.shape[-1]
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    if dispatch.deterministic:
        root = length.square_().mul_(1 / size).add_(eps).sqrt_()
    else:
        root = torch.hypot(length, _least_length(size, eps, wide.dtype)).mul_(_inverse_root(size, wide.dtype))
    return torch.div(wide, root).mul_(weight).to(dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if loops.fit(x) and dtype == x.dtype and residual.dtype == torch.float32 and residual.is_contiguous():
        return _loop().add_rms_norm(x, residual, weight, eps)
    return rms_norm(residual.add_(x), weight, eps, dtype)


@cache
def _loop() -> ModuleType:
    from dashinfer_kernels.norm import cpu_loop

    return cpu_loop
