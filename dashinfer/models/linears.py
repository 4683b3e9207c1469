"""Linear layers from whatever a checkpoint keeps them in: read, rounded to fewer bits where asked, packed for the device.

A format says how one matrix is read; several matrices with the same input become one layer if their codes go together, and a
layer each if they do not.
"""

import itertools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from dashinfer.models.quantization import Rounding
from dashinfer.models.rotation import Rotation
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import Linear, QuantizedRows, QuantizedWeight, pack_linear, pack_quantized, quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quant_matmul.weight import concatenate

# The matrices of a decoder's layer: which norm is before those that read the residual stream, and which write to it.
_LAYER = re.compile(r"(model\.layers\.\d+\.)(?:self_attn|mlp)\.(\w+)_proj\.weight$")
_NORMS = dict.fromkeys("qkv", "input_layernorm") | dict.fromkeys(("gate", "up"), "post_attention_layernorm")
_WRITERS = ("o", "down")


class WeightFormat:
    """How a checkpoint keeps the matrices of its linear layers, and what becomes of them.

    Attributes:
        activations: how the layers' inputs are quantised.
        rounds_head: an output layer whose weights are the embedding's may be rounded to 8 bits where the embedding is there to
            compute the likeliest logits again.
        wide_copy: on CPU, layers also keep a 16-bit copy, which multiplies many rows faster.
        rotates: matrices are those of a decoder whose residual stream is rotated, and contain the norms' weights.
    """

    activations: Activations | None = None
    rounds_head = False
    wide_copy = False
    rotates = False

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        """`part.name` ends in `.weight`, which need not exist. On the reader's device. None: this one is not quantised.

        Raises:
            UnsupportedModel: a tensor is missing or has an unexpected shape or type, or the share cuts a group.
        """
        raise NotImplementedError

    def read_head(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        """As `read`, of the output layer, which has 16 bits unless somebody asked for less."""
        return None

    def steps(self, reader: WeightReader, part: Part) -> tuple[int, int]:
        """How many neighbouring outputs, and inputs, of the matrix `part` one rank must have; 1 where nothing is in the way."""
        return 1, 1

    def read_bias(self, reader: WeightReader, parts: Sequence[Part]) -> Tensor:
        """The biases of the matrices `parts`, one after the other, in the reader's type. Raises as `WeightReader.read`."""
        return reader.read(*map(_bias_part, parts))


class RoundedOnLoad(WeightFormat):
    """Matrices of any float type, rounded one after the other as they are read.

    Where inputs become integers, too, the residual stream is rotated: see `rotation`.
    """

    def __init__(self, rounding: Rounding, *, quantizes_head: bool) -> None:
        self.activations = rounding.activations
        self.rotates = rounding.activations == "int8"
        self._rounding = rounding
        self._quantizes_head = quantizes_head
        self.rounds_head = not quantizes_head

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        if self.rotates and (layer := _LAYER.match(part.name)):
            weight = self._read_rotated(reader, part, *layer.groups())
        else:
            weight = reader.read(part, dtype=self._dtype(reader, part.name))
        if self._rounding.bits is None:
            return quantize_float8(weight)
        group_size = self._rounding.group_for(weight.shape[1])
        return quantize_int(weight, bits=self._rounding.bits, group_size=group_size, symmetric=self._rounding.symmetric)

    def _read_rotated(self, reader: WeightReader, part: Part, layer: str, matrix: str) -> Tensor:
        weight = reader.read(part, dtype=torch.float32)
        if matrix in _WRITERS:
            return Rotation(part.shape[0], reader.device).of_outputs(weight)
        channels = part.shape[1]
        norm = reader.read(Part(f"{layer}{_NORMS[matrix]}.weight", (channels,)), dtype=torch.float32)
        return Rotation(channels, reader.device).of_inputs(weight, norm)

    def read_bias(self, reader: WeightReader, parts: Sequence[Part]) -> Tensor:
        bias = super().read_bias(reader, parts)
        layer = _LAYER.match(parts[0].name)
        if not self.rotates or layer is None or layer[2] not in _WRITERS:
            return bias
        return Rotation(len(bias), reader.device).of_outputs(bias.float()).to(bias.dtype)

    def _dtype(self, reader: WeightReader, name: str) -> torch.dtype:
        """The file's own type where it is a narrow one: half of what goes to a GPU, and of what is there meanwhile."""
        stored = reader.stored_type(name) if name in reader else None
        return stored if stored in (torch.float16, torch.bfloat16) else torch.float32

    def read_head(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        return self.read(reader, part) if self._quantizes_head else None


def load_linear(reader: WeightReader, parts: Sequence[Part], *, bias: bool = False) -> Linear:
    """The layer whose outputs are those of `parts`, one after the other.

    Args:
        bias: whether the checkpoint has `bias` vectors beside the weights.

    Raises:
        UnsupportedModel: as `WeightFormat.read` and `WeightReader.read`.
    """
    form = reader.format
    vector = None if not bias else (form or WeightFormat()).read_bias(reader, parts)
    weights = [None if form is None else form.read(reader, part) for part in parts]
    if form is None or all(weight is None for weight in weights):
        return pack_linear(reader.read(*parts), vector)
    known = [weight for weight in weights if weight is not None]
    if len(known) == len(weights) and all(left.fits(right) for left, right in itertools.pairwise(known)):
        return pack_weight(reader, concatenate(known), vector)
    vectors = [None] * len(parts) if vector is None else vector.split([part.local_shape[0] for part in parts])
    return SideBySide(
        [
            pack_linear(reader.read(part), own) if weight is None else pack_weight(reader, weight, own)
            for part, weight, own in zip(parts, weights, vectors, strict=True)
        ]
    )


def pack_weight(reader: WeightReader, weight: QuantizedWeight, bias: Tensor | None = None) -> Linear:
    """A layer as the reader's format wants it."""
    form = reader.format
    assert form is not None
    return pack_quantized(weight, bias, dtype=reader.dtype, activations=form.activations, wide_copy=form.wide_copy)


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
