"""Public function of linear layers over quantised weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch
from dashinfer_kernels.linear.launch import Linear
from dashinfer_kernels.quant_matmul.reference import Activations, quantize_rows
from dashinfer_kernels.quant_matmul.weight import QuantizedWeight
from dashinfer_kernels.quant_matmul.weight_only import WeightOnlyLinear, can_pack


def pack_quantized(
    weight: QuantizedWeight, bias: Tensor | None = None, *, dtype: torch.dtype, activations: Activations | None = None
) -> Linear:
    """Take over a layer's weights, in the layout that the device multiplies fastest. The caller should drop its own reference.

    Args:
        weight: on the device where the layer is to run.
        bias: [out_features] of `dtype`, or None.
        dtype: of the layer's inputs and outputs: float16, bfloat16 or float32.
        activations: what inputs are quantised to, row by row; None: weights alone are quantised.
    """
    assert bias is None or (bias.shape == (weight.out_features,) and bias.dtype == dtype)
    if activations is None and dispatch.use_triton(weight.codes) and can_pack(weight):
        return WeightOnlyLinear(weight, bias, dtype)
    return UnpackedLinear(weight, bias, dtype, activations)


class UnpackedLinear:
    """Codes as they are, multiplied by `F.linear` after they became `dtype` again, in every call."""

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, activations: Activations | None
    ) -> None:
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self._weight, self._bias, self._dtype, self._activations = weight, bias, dtype, activations
        tensors = (weight.codes, weight.scales, weight.offsets, weight.order, bias)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        if self._activations is not None:
            values, scales = quantize_rows(x, self._activations)
            x = (values.float() * scales.unsqueeze(-1)).to(x.dtype)
        return F.linear(x, self._weight.dequantize(self._dtype), self._bias)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()
