"""Definition of a linear layer over quantised weights, and of the quantisation of activations."""

from typing import Literal

import torch
from torch import Tensor

from dashinfer_kernels.quant_matmul.weight import FLOAT8, QuantizedWeight

Activations = Literal["int8", "fp8"]
# The type of quantised activations, and the greatest value of it that is used.
ACTIVATION_TYPES: dict[Activations, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (FLOAT8, 448.0)}


def quantize_rows(x: Tensor, activations: Activations) -> tuple[Tensor, Tensor]:
    """Each row in 8 bits with a scale of its own.

    Args:
        x: [rows, columns].

    Returns:
        values: [rows, columns] int8 (rounded to the nearest, ties to even) or float8_e4m3fn.
        scales: [rows] float32, the greatest magnitude of the row, or 1e-30 if that is more, / 127 or 448;
            1 for a row of zeros.
    """
    dtype, greatest = ACTIVATION_TYPES[activations]
    wide = x.float()
    peaks = wide.abs().amax(-1)
    scales = torch.where(peaks > 0, peaks.clamp(min=1e-30) / greatest, 1.0)
    values = wide / scales.unsqueeze(-1)
    if dtype == torch.int8:
        values = values.round()
    return values.clamp(-greatest, greatest).to(dtype), scales


def quantized_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, activations: Activations | None = None) -> Tensor:
    """`x @ weight.T + bias` in float64, rounded once at the end.

    Args:
        x: [rows, in_features].
        bias: [out_features] or None.
        activations: how `x` is quantised before, row by row; None: not at all.
    """
    left = x.double()
    if activations is not None:
        values, scales = quantize_rows(x, activations)
        left = values.double() * scales.double().unsqueeze(-1)
    y = left @ weight.dequantize().double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)
