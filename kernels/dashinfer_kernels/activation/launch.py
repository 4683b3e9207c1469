"""Public functions of the gated activations."""

from functools import cache
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.activation import cpu
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quantize_rows.launch import empty_rows, quantize_rows
from dashinfer_kernels.quantized_rows import QuantizedRows

MAX_INTERMEDIATE = 32768  # elements of a row that the quantising kernel keeps in registers


@overload
def silu_mul(gate_up: Tensor, *, quantize: None = None) -> Tensor: ...
@overload
def silu_mul(gate_up: Tensor, *, quantize: Activations | None) -> Tensor | QuantizedRows: ...
def silu_mul(gate_up: Tensor, *, quantize: Activations | None = None) -> Tensor | QuantizedRows:
    """`silu(gate) * up`.

    Args:
        gate_up: [tokens, 2 * intermediate], the gate in the first half of each row; contiguous on a GPU.
        quantize: the result to 8 bits, row by row; on a GPU intermediate is at most `MAX_INTERMEDIATE` then.

    Returns:
        [tokens, intermediate], the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0
    if use_triton(gate_up):
        return _launch(gate_up, gelu=False) if quantize is None else _launch_quantized(gate_up, quantize, gelu=False)
    out = cpu.silu_mul(gate_up)
    return out if quantize is None else quantize_rows(out, quantize)


@overload
def gelu_mul(gate_up: Tensor, *, quantize: None = None) -> Tensor: ...
@overload
def gelu_mul(gate_up: Tensor, *, quantize: Activations | None) -> Tensor | QuantizedRows: ...
def gelu_mul(gate_up: Tensor, *, quantize: Activations | None = None) -> Tensor | QuantizedRows:
    """`gelu(gate) * up` with the tanh approximation.

    Args:
        gate_up: [tokens, 2 * intermediate], the gate in the first half of each row; contiguous on a GPU.
        quantize: the result to 8 bits, row by row; on a GPU intermediate is at most `MAX_INTERMEDIATE` then.

    Returns:
        [tokens, intermediate], the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0
    if use_triton(gate_up):
        return _launch(gate_up, gelu=True) if quantize is None else _launch_quantized(gate_up, quantize, gelu=True)
    out = cpu.gelu_mul(gate_up)
    return out if quantize is None else quantize_rows(out, quantize)


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


def _launch_quantized(gate_up: Tensor, quantize: Activations, *, gelu: bool) -> QuantizedRows:
    assert gate_up.is_contiguous()
    tokens, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    assert 0 < intermediate <= MAX_INTERMEDIATE
    out = empty_rows(gate_up, intermediate, quantize)
    if tokens:
        first, rest, num_warps = quantized_tile(intermediate)
        _kernels().quantized_gated_kernel[(tokens,)](
            gate_up_ptr=gate_up,
            values_ptr=out.values,
            scales_ptr=out.scales,
            INTERMEDIATE=intermediate,
            BLOCK_FIRST=first,
            BLOCK_REST=rest,
            USE_GELU=gelu,
            num_warps=num_warps,
        )
    return out


@cache
def quantized_tile(intermediate: int) -> tuple[int, int, int]:
    """Two powers of two that hold a row with little to spare, the second of which may be 0; and warps.

    A row of Qwen2.5-7B is 18944 long: 16384 and 4096, where one power of two would be 32768.
    """
    first = 1 << (intermediate.bit_length() - 1)
    rest = intermediate - first
    tuned = tuning.lookup("quantized_gated", (intermediate,)) or {}
    num_warps = min(16, max(1, first // 1024))
    return first, 0 if rest == 0 else 1 << (rest - 1).bit_length(), tuned.get("num_warps", num_warps)


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
