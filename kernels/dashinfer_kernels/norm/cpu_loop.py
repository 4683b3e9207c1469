"""Residual sum and RMS norm of a few rows as one compiled loop."""

import numpy as np
import torch
from numba import float32, uint16
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, as_float, float_bits, given, inlined, narrow, take, widen


@inlined
def add_rms_norm_row(x, residual, weight, eps, out):
    """Of arrays of one row."""
    hidden = len(weight)
    squares = np.float32(0)
    for i in range(hidden):
        value = residual[i] + widen(x[i])
        residual[i] = value
        squares += value * value
    scale = np.float32(1) / np.sqrt(squares / np.float32(hidden) + eps)
    for i in range(hidden):
        out[i] = narrow(residual[i] * scale * weight[i])


@Loop
def _add_rms_norm(work):
    _, rows, _, x_ptr, residual_ptr, weight_ptr, out_ptr, hidden, eps_bits = given(work, 9)
    x, out = array(x_ptr, (rows, hidden), uint16), array(out_ptr, (rows, hidden), uint16)
    residual, weight = array(residual_ptr, (rows, hidden), float32), array(weight_ptr, (hidden,), float32)
    row = take(work)
    while row < rows:
        add_rms_norm_row(x[row], residual[row], weight, as_float(eps_bits), out[row])
        row = take(work)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the public function."""
    rows, hidden = x.shape
    out = torch.empty_like(x)
    _add_rms_norm(
        rows, x.numel(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), hidden, float_bits(eps)
    )
    return out
