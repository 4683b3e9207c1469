"""Public functions of the gated activations."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.activation import cpu
from dashinfer_kernels.dispatch import use_triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: [tokens, 2 * intermediate], the gate in the first half of each row; contiguous on a GPU.

    Returns:
        [tokens, intermediate], the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0
    return _launch(gate_up, gelu=False) if use_triton(gate_up) else cpu.silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` with the tanh approximation.

    Args:
        gate_up: [tokens, 2 * intermediate], the gate in the first half of each row; contiguous on a GPU.

    Returns:
        [tokens, intermediate], the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0
    return _launch(gate_up, gelu=True) if use_triton(gate_up) else cpu.gelu_mul(gate_up)


def _launch(gate_up: Tensor, *, gelu: bool) -> Tensor:
    assert gate_up.is_contiguous()
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if tokens and intermediate:
        rows, columns, num_warps = _tile(intermediate)
        _kernels().gated_kernel[(-(-tokens // rows) * -(-intermediate // columns),)](
            gate_up_ptr=gate_up,
            out_ptr=out,
            tokens=tokens,
            INTERMEDIATE=intermediate,
            BLOCK_TOKENS=rows,
            BLOCK_COLUMNS=columns,
            USE_GELU=gelu,
            num_warps=num_warps,
        )
    return out


@cache
def _tile(intermediate: int) -> tuple[int, int, int]:
    """Rows and columns a program, and its warps: 16 elements of each half a thread are four 16-byte loads in flight."""
    tuned = tuning.lookup("gated", (intermediate,)) or {}
    columns = tuned.get("columns", min(2048, 1 << (intermediate - 1).bit_length()))
    return tuned.get("rows", 2048 // columns), columns, tuned.get("num_warps", 4)


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.activation import kernel

    return kernel
