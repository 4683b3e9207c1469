"""How a checkpoint says that its weights are quantised: the `quantization_config` of a config.json, in each library's words.

What cannot be served is refused here, by name. Knows no torch, and no tensors: which of them a module has is the readers'
business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dashinfer.errors import UnsupportedModel
from dashinfer.types import QuantType

Activations = Literal["int8", "fp8"]

_INTEGER_MODES: dict[int, QuantType] = {4: "a16w4", 8: "a16w8"}
_BLOCK = (128, 128)


@dataclass(frozen=True, kw_only=True)
class GPTQSettings:
    """Of one module, or of all that have none of their own.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group_size: inputs that share a scale; None: all of an output's.
        symmetric: the codes' middle stands for 0.
    """

    bits: int
    group_size: int | None
    symmetric: bool


@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """GPTQ as AutoGPTQ and gptqmodel write it.

    Attributes:
        zeros_less_one: the files have zero points less 1 (version 1 of the format).
        zeros_misplaced: those of 3 bits are wrong in a known way, see `unpack_zeros`.
        overrides: patterns that match the beginning of a module's name, and what its settings are instead; None: it is not
            quantised. The first that matches holds.
    """

    settings: GPTQSettings
    zeros_less_one: bool
    zeros_misplaced: bool = False
    overrides: tuple[tuple[re.Pattern[str], GPTQSettings | None], ...] = ()
    activations: None = None

    @property
    def modes(self) -> tuple[QuantType, ...]:
        mode = _INTEGER_MODES.get(self.settings.bits)
        return ("gptq",) if mode is None else ("gptq", mode)

    def __str__(self) -> str:
        return f"GPTQ in {self.settings.bits} bits"

    def of(self, module: str) -> GPTQSettings | None:
        """The settings of a module, by its name without `.weight`."""
        for pattern, settings in self.overrides:
            if pattern.match(module):
                return settings
        return self.settings


@dataclass(frozen=True, kw_only=True)
class AWQConfig:
    """AWQ in 4 bits, in the layout that AutoAWQ calls GEMM. `group_size` as in `GPTQSettings`."""

    group_size: int | None
    activations: None = None
    modes: tuple[QuantType, ...] = ("a16w4",)

    def __str__(self) -> str:
        return "AWQ in 4 bits"


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
        return "a8w8" if self.activations == "int8" else _INTEGER_MODES.get(weights.bits)

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


CheckpointQuantization = GPTQConfig | AWQConfig | ScaledConfig


def read_quantization(table: Any) -> CheckpointQuantization | None:
    """From the value of `quantization_config`; None where there is none.

    Raises:
        UnsupportedModel: a method or setting that cannot be served.
    """
    if not table:
        return None
    if not isinstance(table, Mapping):
        raise UnsupportedModel(f"config.json: quantization_config is {table!r}, not a table")
    method = table.get("quant_method")
    if method == "gptq":
        return _gptq(table)
    if method == "awq":
        return _awq(table)
    if method == "compressed-tensors":
        return _compressed(table)
    if method == "fp8":
        return _fp8(table)
    raise UnsupportedModel(
        f"checkpoints quantised with {method or 'an unnamed method'} are not supported; "
        "supported are gptq, awq, compressed-tensors and fp8, the model's original weights and .gguf files"
    )


def check_quant_type(
    quantization: CheckpointQuantization | None, name: str, quant_type: QuantType | None, *, regroup: bool = False
) -> None:
    """Whether `--quant-type` goes with a checkpoint.

    Args:
        regroup: a group size or the head's quantisation was asked for as well.

    Raises:
        UnsupportedModel: it asks for what the checkpoint is not.
    """
    if quantization is None:
        if quant_type == "gptq":
            raise UnsupportedModel(
                f"--quant-type gptq: {name} is not a GPTQ checkpoint; use another --quant-type to quantise it"
            )
        return
    if quant_type is not None and quant_type not in quantization.modes:
        raise UnsupportedModel(
            f"--quant-type {quant_type}: {name} is quantised already ({quantization}); leave out --quant-type"
        )
    if regroup:
        raise UnsupportedModel(
            f"{name} is quantised already ({quantization}), which decides on groups and the output layer; "
            "leave out --quant-group-size and --quantize-head"
        )


def _gptq(table: Mapping[str, Any]) -> GPTQConfig:
    form = table.get("checkpoint_format") or table.get("format") or "gptq"
    if table.get("is_marlin_format"):
        form = "marlin"
    if form not in ("gptq", "gptq_v2"):
        raise _unsupported(f"GPTQ checkpoints of the format {form!r}", "gptq and gptq_v2")
    packed = table.get("pack_dtype") or "int32"
    if packed not in ("int32", "torch.int32"):
        raise _unsupported(f"GPTQ codes packed into {packed!r}", "int32")
    if table.get("rotation"):
        raise _unsupported(f"the rotation {table['rotation']!r} of a GPTQ checkpoint", "none")
    settings = _gptq_settings(table, None)
    overrides = []
    dynamic = table.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise UnsupportedModel(f"config.json: dynamic of quantization_config is {dynamic!r}, not a table")
    for key, changes in dynamic.items():
        pattern = _pattern(key.removeprefix("-:").removeprefix("+:"))
        overrides.append((pattern, None if key.startswith("-:") else _gptq_settings(changes or {}, settings)))
    overrides.sort(key=lambda override: override[1] is not None)  # what is not quantised comes first
    return GPTQConfig(
        settings=settings, zeros_less_one=form == "gptq", zeros_misplaced=_before_7(table), overrides=tuple(overrides)
    )


def _before_7(table: Mapping[str, Any]) -> bool:
    """Whether gptqmodel before 7.0 wrote the files."""
    meta = table.get("meta")
    found = re.search(r"gptqmodel:(\d+)\.", str(meta.get("quantizer"))) if isinstance(meta, Mapping) else None
    return found is not None and int(found[1]) < 7


def _gptq_settings(table: Mapping[str, Any], default: GPTQSettings | None) -> GPTQSettings:
    bits = table.get("bits", default.bits if default else None)
    if bits not in (2, 3, 4, 8) or isinstance(bits, bool):
        raise _unsupported(f"GPTQ in {bits!r} bits", "2, 3, 4 and 8")
    group_size = default.group_size if default and "group_size" not in table else _group_size(table.get("group_size"))
    return GPTQSettings(
        bits=bits, group_size=group_size, symmetric=bool(table.get("sym", default.symmetric if default else True))
    )


def _awq(table: Mapping[str, Any]) -> AWQConfig:
    version = str(table.get("version") or table.get("checkpoint_format") or table.get("format") or "gemm").lower()
    if version != "gemm":
        raise _unsupported(f"AWQ checkpoints of the version {version!r}", "gemm")
    if table.get("backend", "autoawq") != "autoawq":
        raise _unsupported(f"AWQ checkpoints of the backend {table['backend']!r}", "autoawq")
    bits = table.get("bits", table.get("w_bit"))
    if bits != 4:
        raise _unsupported(f"AWQ in {bits!r} bits", "4")
    return AWQConfig(group_size=_group_size(table.get("group_size", table.get("q_group_size"))))


_COMPRESSED_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


def _compressed(table: Mapping[str, Any]) -> ScaledConfig:
    groups = table.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedModel("config.json: quantization_config has no config_groups")
    if table.get("transform_config"):
        raise _unsupported("compressed-tensors checkpoints with a transform_config", "those without")
    sparsity = (table.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unsupported(f"compressed-tensors checkpoints with sparsity of the format {sparsity!r}", "dense")
    found, activations = [], []
    for group in groups.values():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise UnsupportedModel("config.json: a group of quantization_config's config_groups does not say what weights are")
        form = group.get("format") or table.get("format")
        if form not in _COMPRESSED_FORMATS:
            raise _unsupported(f"compressed-tensors of the format {form!r}", ", ".join(_COMPRESSED_FORMATS[:-1]))
        if group.get("output_activations"):
            raise _unsupported("compressed-tensors checkpoints with quantised output_activations", "input_activations")
        weights = _compressed_weights(group["weights"])
        activations.append(_compressed_activations(group.get("input_activations"), weights))
        found.append((_names(group.get("targets"), "targets"), weights))
    if len(set(activations)) > 1:
        raise _unsupported("activations that are quantised in some layers only", "the same in all layers")
    return ScaledConfig(
        library="compressed-tensors",
        groups=tuple(found),
        ignore=_names(table.get("ignore") or (), "ignore"),
        activations=activations[0],
    )


def _compressed_weights(table: Mapping[str, Any]) -> ScaledWeights:
    kind, bits, strategy = table.get("type", "int"), table.get("num_bits", 8), table.get("strategy")
    if (kind, bits) not in (("int", 2), ("int", 4), ("int", 8), ("float", 8)):
        raise _unsupported(f"weights of {bits!r}-bit {kind!r} numbers", "2, 4 and 8-bit integers and 8-bit floats")
    symmetric = bool(table.get("symmetric", True))
    if kind == "float" and not symmetric:
        raise _unsupported("float8 weights with zero points", "those without")
    if table.get("dynamic"):
        raise _unsupported("weights with dynamic scales", "static ones")
    group_size = table.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    number = None if kind == "float" else bits
    if strategy == "tensor":
        return ScaledWeights(bits=number, scale="tensor", symmetric=symmetric)
    if strategy == "channel":
        return ScaledWeights(bits=number, scale="output", symmetric=symmetric)
    if strategy == "group":
        return ScaledWeights(bits=number, scale="group", group_size=_group_size(group_size), symmetric=symmetric)
    if strategy == "block" and kind == "float":
        return _blocks(table.get("block_structure"))
    raise _unsupported(f"weights with scales by {strategy!r}", "tensor, channel, group, and block for float8")


def _compressed_activations(table: Any, weights: ScaledWeights) -> Activations | None:
    if not table:
        return None
    kind, bits = table.get("type", "int"), table.get("num_bits", 8)
    if bits != 8 or not table.get("symmetric", True):
        raise _unsupported(f"activations of {bits!r}-bit {kind!r} numbers, or with zero points", "8 bits without")
    if kind == "float" and weights.bits is None:
        return "fp8"
    if kind == "int" and weights.bits == 8 and weights.symmetric and weights.scale in ("tensor", "output"):
        return "int8"
    raise _unsupported(f"activations of 8-bit {kind!r} numbers with such weights", "int8 with int8, float8 with float8")


def _fp8(table: Mapping[str, Any]) -> ScaledConfig:
    block = table.get("weight_block_size")
    scheme = table.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _unsupported(f"float8 checkpoints with the activation_scheme {scheme!r}", "dynamic and static")
    form = table.get("fmt") or "e4m3"
    if form != "e4m3":
        raise _unsupported(f"float8 checkpoints of the format {form!r}", "e4m3")
    weights = _blocks(block) if block else ScaledWeights(bits=None, scale="tensor")
    ignore = table.get("modules_to_not_convert") or table.get("ignored_layers") or ()
    return ScaledConfig(
        library="fp8", groups=((("Linear",), weights),), ignore=_names(ignore, "modules_to_not_convert"), activations="fp8"
    )


def _blocks(block: Any) -> ScaledWeights:
    if not isinstance(block, list | tuple) or tuple(block) != _BLOCK:
        raise _unsupported(f"float8 weights with scales by blocks of {block!r}", "128 x 128")
    return ScaledWeights(bits=None, scale="block", group_size=_BLOCK[1], block_rows=_BLOCK[0])


def _group_size(value: Any) -> int | None:
    if value in (-1, None):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 8:
        raise UnsupportedModel(f"config.json: group_size of quantization_config is {value!r}, no multiple of 8 and not -1")
    return value


def _names(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UnsupportedModel(f"config.json: {key} of quantization_config is {value!r}, not a list of names")
    for name in value:
        if name.startswith("re:"):
            _pattern(name[3:])
    return tuple(value)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UnsupportedModel(f"config.json: quantization_config has the pattern {text!r}, which is none: {error}") from None


def _matches(name: str, module: str) -> bool:
    """Whether a target or an exception stands for a module. Names of classes do, too: all modules here are `Linear`."""
    if name.startswith("re:"):
        return re.match(name[3:], module) is not None
    return name in ("Linear", module) or module.endswith(f".{name}") or module.startswith(f"{name}.")


def _unsupported(what: str, known: str) -> UnsupportedModel:
    return UnsupportedModel(f"{what} are not supported; supported: {known}")
