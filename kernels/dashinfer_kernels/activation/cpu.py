"""Gated activations on CPU: two vectorised passes, with one rounding in between for 16-bit types; for a few rows one loop.

torch computes their sigmoid with one exponential for whole vectors and another for what is left over, so an element's bits
change with its place. `torch.exp` has one for both, and all other steps of the deterministic path are exactly rounded.
"""

import math
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch, loops


def silu_mul(gate_up: Tensor) -> Tensor:
    if loops.fit(gate_up):
        return _loop().silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    if dispatch.deterministic:
        gate = _wide(gate)
        return _gated(gate, gate, up)
    return F.silu(gate).mul_(up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    if loops.fit(gate_up):
        return _loop().gelu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    if dispatch.deterministic:
        gate = _wide(gate)
        # (1 + tanh(x)) / 2 is the sigmoid of 2 x
        return _gated(gate, (gate * gate * gate).mul_(0.044715).add_(gate).mul_(2 * math.sqrt(2 / math.pi)), up)
    return F.gelu(gate, approximate="tanh").mul_(up)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gated(gate: Tensor, argument: Tensor, up: Tensor) -> Tensor:
    """`gate * sigmoid(argument) * up`, in the type of `up`."""
    return torch.div(gate, torch.neg(argument).exp_().add_(1)).mul_(up).to(up.dtype)


@cache
def _loop() -> ModuleType:
    from dashinfer_kernels.activation import cpu_loop

    return cpu_loop
