"""Residual sum and RMS norm of a few rows as one compiled loop."""

import numpy as np
import torch
from numba import float32, uint16
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, as_float, float_bits, given, narrow, take, widen


@Loop
def _add_rms_norm(work):
    _, rows, _, x_ptr, residual_ptr, weight_ptr, out_ptr, hidden, eps_bits = given(work, 9)
    x, out = array(x_ptr, (rows, hidden), uint16), array(out_ptr, (rows, hidden), uint16)
    residual, weight = array(residual_ptr, (rows, hidden), float32), array(weight_ptr, (hidden,), float32)
    eps = as_float(eps_bits)
    row = take(work)
    while row < rows:
        squares = np.float32(0)
        for i in range(hidden):
            value = residual[row, i] + widen(x[row, i])
            residual[row, i] = value
            squares += value * value
        scale = np.float32(1) / np.sqrt(squares / np.float32(hidden) + eps)
        for i in range(hidden):
            out[row, i] = narrow(residual[row, i] * scale * weight[i])
        row = take(work)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the public function."""
    rows, hidden = x.shape
    out = torch.empty_like(x)
    _add_rms_norm(
        rows, x.numel(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), hidden, float_bits(eps)
    )
    return out
