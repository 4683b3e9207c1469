"""Public function of linear layers over quantised weights."""

import torch
from torch import Tensor

from dashinfer_kernels.dispatch import use_triton
from dashinfer_kernels.linear.launch import Linear, PlainLinear
from dashinfer_kernels.quant_matmul.cpu import pack_on_cpu
from dashinfer_kernels.quant_matmul.reference import Activations, quantize_rows
from dashinfer_kernels.quant_matmul.scaled import ScaledLinear, multiplies
from dashinfer_kernels.quant_matmul.weight import QuantizedWeight
from dashinfer_kernels.quant_matmul.weight_only import WeightOnlyLinear, can_pack


def pack_quantized(
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    activations: Activations | None = None,
    wide_copy: bool = False,
) -> Linear:
    """Take over a layer's weights, in the layout that the device multiplies fastest. The caller should drop its own reference.

    Args:
        weight: on the device where the layer is to run.
        bias: [out_features] of `dtype`, or None.
        dtype: of the layer's inputs and outputs: float16, bfloat16 or float32.
        activations: what inputs are quantised to, row by row; None: weights alone are quantised. "fp8" is what inputs are where
            the device multiplies float8 (NVIDIA GPUs from compute capability 8.9 on), and means the weights alone elsewhere.
        wide_copy: on CPU, keep the weights in `dtype` as well, for numbers of rows that are multiplied faster by those.
    """
    assert bias is None or (bias.shape == (weight.out_features,) and bias.dtype == dtype)
    if not use_triton(weight.codes):
        return pack_on_cpu(weight, bias, dtype, activations, wide_copy=wide_copy)
    if activations is not None and multiplies(weight, activations):
        return ScaledLinear(weight, bias, dtype, activations)
    if activations == "fp8":
        activations = None
    if activations is None and can_pack(weight):
        return WeightOnlyLinear(weight, bias, dtype)
    return UnpackedLinear(weight, bias, dtype, activations)


class UnpackedLinear:
    """Codes as they are, multiplied as 16-bit weights are after they became `dtype` again, in every call."""

    takes = None

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, activations: Activations | None
    ) -> None:
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self._weight, self._bias, self._dtype, self._activations = weight, bias, dtype, activations
        tensors = (weight.codes, weight.scales, weight.offsets, weight.order, bias)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._plain()(self._rounded(x))

    def wide(self, x: Tensor) -> Tensor:
        return self._plain().wide(self._rounded(x))

    def _plain(self) -> PlainLinear:
        return PlainLinear(self._weight.dequantize(self._dtype), self._bias)

    def _rounded(self, x: Tensor) -> Tensor:
        if self._activations is None:
            return x
        values, scales = quantize_rows(x, self._activations)
        return (values.float() * scales.unsqueeze(-1)).to(x.dtype)
