"""Gated activations of a few rows as one compiled loop."""

import math
from collections.abc import Callable

import numpy as np
import torch
from numba import uint16
from torch import Tensor

from dashinfer_kernels.compiled import array, compiled, exp, narrow, widen


@compiled("void(int64, int64, int64, int64)")
def _silu_mul(gate_up_ptr, out_ptr, rows, intermediate):
    gate_up, out = array(gate_up_ptr, (rows, 2, intermediate), uint16), array(out_ptr, (rows, intermediate), uint16)
    for row in range(rows):
        for i in range(intermediate):
            gate, up = widen(gate_up[row, 0, i]), widen(gate_up[row, 1, i])
            out[row, i] = narrow(gate / (np.float32(1) + exp(-gate)) * up)


@compiled("void(int64, int64, int64, int64)")
def _gelu_mul(gate_up_ptr, out_ptr, rows, intermediate):
    gate_up, out = array(gate_up_ptr, (rows, 2, intermediate), uint16), array(out_ptr, (rows, intermediate), uint16)
    for row in range(rows):
        for i in range(intermediate):
            gate, up = widen(gate_up[row, 0, i]), widen(gate_up[row, 1, i])
            # (1 + tanh(x)) / 2 is the sigmoid of 2 x
            argument = np.float32(2 * math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate * gate * gate)
            out[row, i] = narrow(gate / (np.float32(1) + exp(-argument)) * up)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As the public function."""
    return _call(_silu_mul, gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As the public function."""
    return _call(_gelu_mul, gate_up)


def _call(loop: Callable[..., None], gate_up: Tensor) -> Tensor:
    rows, both = gate_up.shape
    out = torch.empty(rows, both // 2, dtype=gate_up.dtype)
    loop(gate_up.data_ptr(), out.data_ptr(), rows, both // 2)
    return out
