"""Linear layers from whatever a checkpoint keeps them in: read, rounded to fewer bits where asked, packed for the device.

A format says how one matrix is read; several matrices with the same input become one layer if their codes go together, and a
layer each if they do not.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dashinfer.models.quantization import Rounding
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import Linear, QuantizedRows, QuantizedWeight, pack_linear, pack_quantized, quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quant_matmul.weight import concatenate


class WeightFormat(Protocol):
    """How a checkpoint keeps the matrices of its linear layers; `activations`: how their inputs are quantised."""

    activations: Activations | None

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        """`part.name` ends in `.weight`, which need not exist. On the reader's device. None: this one is not quantised.

        Raises:
            UnsupportedModel: a tensor is missing or has an unexpected shape or type, or the share cuts a group.
        """
        ...


class RoundedOnLoad:
    """Matrices of any float type, rounded one after the other as they are read."""

    def __init__(self, rounding: Rounding) -> None:
        self.activations = rounding.activations
        self._rounding = rounding

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        weight = reader.read(part, dtype=torch.float32)
        if self._rounding.bits is None:
            return quantize_float8(weight)
        group_size = self._rounding.group_for(weight.shape[1])
        return quantize_int(weight, bits=self._rounding.bits, group_size=group_size, symmetric=self._rounding.symmetric)


def load_linear(reader: WeightReader, parts: Sequence[Part], *, bias: bool = False, quantized: bool = True) -> Linear:
    """The layer whose outputs are those of `parts`, one after the other.

    Args:
        bias: whether the checkpoint has `bias` vectors beside the weights.
        quantized: False: in 16 bits whatever the checkpoint's other layers are.

    Raises:
        UnsupportedModel: as `WeightFormat.read` and `WeightReader.read`.
    """
    vector = reader.read(*map(_bias_part, parts)) if bias else None
    form = reader.format if quantized else None
    weights = [None if form is None else form.read(reader, part) for part in parts]
    if form is None or all(weight is None for weight in weights):
        return pack_linear(reader.read(*parts), vector)
    known = [weight for weight in weights if weight is not None]
    if len(known) == len(weights) and all(left.fits(right) for left, right in itertools.pairwise(known)):
        return pack_quantized(concatenate(known), vector, dtype=reader.dtype, activations=form.activations)
    vectors = [None] * len(parts) if vector is None else vector.split([part.local_shape[0] for part in parts])
    layers: list[Linear] = []
    for part, weight, own in zip(parts, weights, vectors, strict=True):
        if weight is None:
            layers.append(pack_linear(reader.read(part), own))
        else:
            layers.append(pack_quantized(weight, own, dtype=reader.dtype, activations=form.activations))
    return SideBySide(layers)


def _bias_part(part: Part) -> Part:
    return Part(part.name.removesuffix("weight") + "bias", part.shape[:1], part.rows)


class SideBySide:
    """Layers with the same input and the outputs of one after those of the other."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = layers
        self.in_features = layers[0].in_features
        self.out_features = sum(layer.out_features for layer in layers)
        self.nbytes = sum(layer.nbytes for layer in layers)
        kinds = {layer.takes for layer in layers}
        self.takes = kinds.pop() if len(kinds) == 1 else None

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        return torch.cat([layer(x) for layer in self._layers], -1)

    def wide(self, x: Tensor | QuantizedRows) -> Tensor:
        return torch.cat([layer.wide(x) for layer in self._layers], -1)
