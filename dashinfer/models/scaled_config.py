"""Integers or float8 numbers with scales: how compressed-tensors, and float8 checkpoints of other libraries, describe them.

Knows no torch, and no tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dashinfer.errors import UnsupportedModel
from dashinfer.models.quantized_values import read_group_size, read_names, unsupported
from dashinfer.types import QuantType

Activations = Literal["int8", "fp8"]

INTEGER_MODES: dict[int, QuantType] = {4: "a16w4", 8: "a16w8"}  # of weights alone, by their bits
_BLOCK = (128, 128)


@dataclass(frozen=True, kw_only=True)
class ScaledWeights:
    """Integers or float8 numbers with scales.

    Attributes:
        bits: of a code; None: float8 (E4M3).
        scale: what shares one: the whole tensor, an output, a group of an output's inputs, or a block.
        group_size: inputs of a group or block.
        block_rows: outputs of a block.
        symmetric: code 0 stands for 0.
    """

    bits: int | None
    scale: Literal["tensor", "output", "group", "block"]
    group_size: int | None = None
    block_rows: int = 1
    symmetric: bool = True


@dataclass(frozen=True, kw_only=True)
class ScaledConfig:
    """What compressed-tensors writes, and float8 checkpoints of other libraries.

    Attributes:
        groups: the names of modules that go together (`re:` begins a pattern, `Linear` means all), and what their weights are.
        ignore: modules of no group, as above.
        activations: what inputs are rounded to, row by row. A checkpoint's static scales of activations are not used.
    """

    library: str
    groups: tuple[tuple[tuple[str, ...], ScaledWeights], ...]
    ignore: tuple[str, ...] = ()
    activations: Activations | None = None

    @property
    def modes(self) -> tuple[QuantType, ...]:
        modes = {self._mode(weights) for _, weights in self.groups}
        return tuple(mode for mode in modes if mode is not None) if len(modes) == 1 else ()

    def _mode(self, weights: ScaledWeights) -> QuantType | None:
        if weights.bits is None:
            return "fp8"
        return "a8w8" if self.activations == "int8" else INTEGER_MODES.get(weights.bits)

    def __str__(self) -> str:
        names = sorted({"float8" if weights.bits is None else f"{weights.bits}-bit integers" for _, weights in self.groups})
        return f"{self.library} in {' and '.join(names)}"

    def of(self, module: str) -> ScaledWeights | None:
        """What the weights of a module are, by its name without `.weight`; None: not quantised."""
        if any(_matches(name, module) for name in self.ignore):
            return None
        for targets, weights in self.groups:
            if any(_matches(target, module) for target in targets):
                return weights
        return None


_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


def compressed_config(table: Mapping[str, Any]) -> ScaledConfig:
    """From the table of compressed-tensors. Raises UnsupportedModel."""
    groups = table.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedModel("config.json: quantization_config has no config_groups")
    if table.get("transform_config"):
        raise unsupported("compressed-tensors checkpoints with a transform_config", "those without")
    sparsity = (table.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise unsupported(f"compressed-tensors checkpoints with sparsity of the format {sparsity!r}", "dense")
    found, activations = [], []
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise UnsupportedModel("config.json: a group of quantization_config's config_groups does not say what weights are")
        form = group.get("format") or table.get("format")
        if form not in _COMPRESSED_FORMATS:
            raise unsupported(f"compressed-tensors of the format {form!r}", ", ".join(_COMPRESSED_FORMATS[:-1]))
        if group.get("output_activations"):
            raise unsupported("compressed-tensors checkpoints with quantised output_activations", "input_activations")
        weights = _compressed_weights(group["weights"])
        activations.append(_compressed_activations(group.get("input_activations"), weights))
        found.append((read_names(group.get("targets"), "targets"), weights))
    if len(set(activations)) > 1:
        raise unsupported("activations that are quantised in some layers only", "the same in all layers")
    return ScaledConfig(
        library="compressed-tensors",
        groups=tuple(found),
        ignore=read_names(table.get("ignore") or (), "ignore"),
        activations=activations[0],
    )


def _compressed_weights(table: Mapping[str, Any]) -> ScaledWeights:
    kind, bits, strategy = table.get("type", "int"), table.get("num_bits", 8), table.get("strategy")
    if (kind, bits) not in (("int", 2), ("int", 4), ("int", 8), ("float", 8)):
        raise unsupported(f"weights of {bits!r}-bit {kind!r} numbers", "2, 4 and 8-bit integers and 8-bit floats")
    symmetric = bool(table.get("symmetric", True))
    if kind == "float" and not symmetric:
        raise unsupported("float8 weights with zero points", "those without")
    if table.get("dynamic"):
        raise unsupported("weights with dynamic scales", "static ones")
    group_size = table.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    number = None if kind == "float" else bits
    if strategy == "tensor":
        return ScaledWeights(bits=number, scale="tensor", symmetric=symmetric)
    if strategy == "channel":
        return ScaledWeights(bits=number, scale="output", symmetric=symmetric)
    if strategy == "group":
        return ScaledWeights(bits=number, scale="group", group_size=read_group_size(group_size), symmetric=symmetric)
    if strategy == "block" and kind == "float":
        return _blocks(table.get("block_structure"))
    raise unsupported(f"weights with scales by {strategy!r}", "tensor, channel, group, and block for float8")


def _compressed_activations(table: Any, weights: ScaledWeights) -> Activations | None:
    if not table:
        return None
    kind, bits = table.get("type", "int"), table.get("num_bits", 8)
    if bits != 8 or not table.get("symmetric", True):
        raise unsupported(f"activations of {bits!r}-bit {kind!r} numbers, or with zero points", "8 bits without")
    if kind == "float" and weights.bits is None:
        return "fp8"
    if kind == "int" and weights.bits == 8 and weights.symmetric and weights.scale in ("tensor", "output"):
        return "int8"
    raise unsupported(f"activations of 8-bit {kind!r} numbers with such weights", "int8 with int8, float8 with float8")


def float8_config(table: Mapping[str, Any]) -> ScaledConfig:
    """From the table of the method `fp8`. Raises UnsupportedModel."""
    block = table.get("weight_block_size")
    scheme = table.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise unsupported(f"float8 checkpoints with the activation_scheme {scheme!r}", "dynamic and static")
    form = table.get("fmt") or "e4m3"
    if form != "e4m3":
        raise unsupported(f"float8 checkpoints of the format {form!r}", "e4m3")
    weights = _blocks(block) if block else ScaledWeights(bits=None, scale="tensor")
    ignore = table.get("modules_to_not_convert") or table.get("ignored_layers") or ()
    return ScaledConfig(
        library="fp8", groups=((("Linear",), weights),), ignore=read_names(ignore, "modules_to_not_convert"), activations="fp8"
    )


def _blocks(block: Any) -> ScaledWeights:
    if not isinstance(block, list | tuple) or tuple(block) != _BLOCK:
        raise unsupported(f"float8 weights with scales by blocks of {block!r}", "128 x 128")
    return ScaledWeights(bits=None, scale="block", group_size=_BLOCK[1], block_rows=_BLOCK[0])


def _matches(name: str, module: str) -> bool:
    """Whether a target or an exception stands for a module. Names of classes do, too: all modules here are `Linear`."""
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return name in ("Linear", module) or module.endswith(f".{name}") or module.startswith(f"{name}.")
