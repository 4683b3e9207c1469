"""What a model's linear layers are kept in: decided from the flags and the checkpoint before anything heavy is imported."""

from dataclasses import dataclass
from typing import Literal

from dashinfer.models.quantized_config import CheckpointQuantization
from dashinfer.types import QuantType


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Weights of 16 or 32 bits rounded to fewer while they are read.

    Attributes:
        bits: of integer codes, 4 or 8; None: float8 (E4M3) with a scale an output.
        group_size: inputs that share a scale; None: all of an output's.
        symmetric: without offsets.
        activations: what inputs are rounded to, row by row; None: not at all.
    """

    bits: int | None
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["int8", "fp8"] | None = None

    @property
    def bits_per_weight(self) -> float:
        """With a weight's share of its group's scale and offset, of 16 bits each."""
        shared = 16 * (1 if self.symmetric else 2) / self.group_size if self.group_size else 0
        return (self.bits or 8) + shared

    def group_for(self, in_features: int) -> int | None:
        """The group size of a matrix: halved until it divides the inputs."""
        size = self.group_size
        while size is not None and in_features % size:
            size //= 2
        return size


def rounding(quant_type: QuantType, group_size: int | None) -> Rounding:
    """What `--quant-type` asks for, of a checkpoint that is not quantised.

    Args:
        group_size: as asked for; None: the mode's own.
    """
    if quant_type == "a16w4":
        return Rounding(bits=4, group_size=group_size or 128, symmetric=False)
    if quant_type == "a16w8":
        return Rounding(bits=8, group_size=group_size)
    if quant_type == "a8w8":
        return Rounding(bits=8, activations="int8")
    assert quant_type == "fp8"
    return Rounding(bits=None, activations="fp8")


def layer_bits(
    quant_type: QuantType | None, quantization: CheckpointQuantization | None, group_size: int | None, otherwise: int
) -> float:
    """Bits of a weight in a layer's matrices, about.

    Args:
        quantization: the checkpoint's; `quant_type` and `group_size`: as asked for.
        otherwise: where nothing is quantised.
    """
    if quantization is not None:
        modes = [mode for mode in quantization.modes if mode != "gptq"]
        return rounding(modes[0], None).bits_per_weight if modes else 4
    return otherwise if quant_type is None else rounding(quant_type, group_size).bits_per_weight
