"""Public function of linear layers: weights in the layout that the device multiplies fastest."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels.linear.cpu import PackedLinear


class Linear(Protocol):
    """A linear layer that owns its weights."""

    in_features: int
    out_features: int
    nbytes: int  # what the layer holds

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in the type of the weights."""
        ...


class PlainLinear:
    """A layer on a device where `F.linear` is the fast way."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


def pack_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Take over a layer's weights. The caller should drop its own reference: on CPU the layer keeps a copy in another layout.

    Args:
        weight: [out_features, in_features].
        bias: [out_features], the type of `weight`, or None.
    """
    assert weight.ndim == 2
    assert bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
    return PackedLinear(weight, bias) if weight.device.type == "cpu" else PlainLinear(weight, bias)
