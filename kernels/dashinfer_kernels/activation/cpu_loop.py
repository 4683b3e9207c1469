"""Gated activations of a few rows as one compiled loop."""

import math

import numpy as np
import torch
from numba import uint16
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, exp, given, narrow, shared, take, widen


@shared
def silu_mul_row(gate, up, out):
    """Of arrays of one row."""
    for i in range(len(out)):
        x = widen(gate[i])
        out[i] = narrow(x / (np.float32(1) + exp(-x)) * widen(up[i]))


@Loop
def _silu_mul(work):
    _, rows, _, gate_up_ptr, out_ptr, intermediate = given(work, 6)
    gate_up, out = array(gate_up_ptr, (rows, 2, intermediate), uint16), array(out_ptr, (rows, intermediate), uint16)
    row = take(work)
    while row < rows:
        silu_mul_row(gate_up[row, 0], gate_up[row, 1], out[row])
        row = take(work)


@Loop
def _gelu_mul(work):
    _, rows, _, gate_up_ptr, out_ptr, intermediate = given(work, 6)
    gate_up, out = array(gate_up_ptr, (rows, 2, intermediate), uint16), array(out_ptr, (rows, intermediate), uint16)
    row = take(work)
    while row < rows:
        for i in range(intermediate):
            gate, up = widen(gate_up[row, 0, i]), widen(gate_up[row, 1, i])
            # (1 + tanh(x)) / 2 is the sigmoid of 2 x
            argument = np.float32(2 * math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate * gate * gate)
            out[row, i] = narrow(gate / (np.float32(1) + exp(-argument)) * up)
        row = take(work)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As the public function."""
    return _call(_silu_mul, gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """As the public function."""
    return _call(_gelu_mul, gate_up)


def _call(loop: Loop, gate_up: Tensor) -> Tensor:
    rows, both = gate_up.shape
    out = torch.empty(rows, both // 2, dtype=gate_up.dtype)
    loop(rows, gate_up.numel(), gate_up.data_ptr(), out.data_ptr(), both // 2)
    return out
