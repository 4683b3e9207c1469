"""Public function of the quantisation of rows. Its definition is `quant_matmul.reference.quantize_rows`."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import tuning
from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.quant_matmul import reference
from dashinfer_kernels.quant_matmul.reference import ACTIVATION_TYPES, Activations
from dashinfer_kernels.quantized_rows import QuantizedRows

MAX_COLUMNS = 32768  # elements of a row that the Triton kernel keeps in registers


def quantize_rows(x: Tensor, activations: Activations) -> QuantizedRows:
    """Each row in 8 bits with a scale of its own.

    Args:
        x: [rows, columns] of any float type; on a GPU with contiguous rows of at most `MAX_COLUMNS`.
        activations: "int8", rounded to the nearest, or "fp8" (E4M3).
    """
    if not use_triton(x):
        return QuantizedRows(*reference.quantize_rows(x, activations))
    rows, columns = x.shape
    assert columns <= MAX_COLUMNS and x.stride(1) == 1
    out = empty_rows(x, columns, activations)
    if rows:
        block_rows, block_columns, num_warps = _tile(columns)
        _kernels().quantize_rows_kernel[(-(-rows // block_rows),)](
            x_ptr=x,
            values_ptr=out.values,
            scales_ptr=out.scales,
            rows=rows,
            x_stride=x.stride(0),
            COLUMNS=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps,
        )
    return out


def empty_rows(x: Tensor, columns: int, activations: Activations) -> QuantizedRows:
    """Room for as many rows as `x` has, on its device."""
    values = torch.empty((len(x), columns), dtype=ACTIVATION_TYPES[activations][0], device=x.device)
    return QuantizedRows(values, torch.empty((len(x),), dtype=torch.float32, device=x.device))


@cache
def _tile(columns: int) -> tuple[int, int, int]:
    """Rows and columns a program, and its warps: 16 elements a thread, as far as there are threads."""
    block_columns = 1 << (columns - 1).bit_length()
    tuned = tuning.lookup("quantize_rows", (columns,)) or {}
    block_rows = tuned.get("rows", max(1, 2048 // block_columns))
    return block_rows, block_columns, tuned.get("num_warps", min(16, max(1, block_rows * block_columns // 512)))


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.quantize_rows import kernel

    return kernel
