"""Definition of the gated activations (Shazeer 2020, arXiv:2002.05202)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, in at least float32, rounded once at the end."""
    gate, up = _halves(gate_up)
    return (F.silu(gate) * up).to(gate_up.dtype)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` with the tanh approximation, in at least float32, rounded once at the end."""
    gate, up = _halves(gate_up)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
