"""How a checkpoint says that its weights are quantised: the `quantization_config` of a config.json, in each library's words.

What cannot be served is refused here, by name. Knows no torch, and no tensors: which of them a module has is the readers'
business.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dashinfer.errors import UnsupportedModel
from dashinfer.models.quantized_values import read_group_size, read_pattern, unsupported
from dashinfer.models.scaled_config import INTEGER_MODES, ScaledConfig, compressed_config, float8_config
from dashinfer.types import QuantType


@dataclass(frozen=True, kw_only=True)
class GPTQSettings:
    """Of one module, or of all that have none of their own.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        group_size: inputs that share a scale; None: all of an output's.
        symmetric: the codes' middle stands for 0, whatever zero points there are.
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
        mode = INTEGER_MODES.get(self.settings.bits)
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
        return compressed_config(table)
    if method == "fp8":
        return float8_config(table)
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
        raise unsupported(f"GPTQ checkpoints of the format {form!r}", "gptq and gptq_v2")
    packed = table.get("pack_dtype") or "int32"
    if packed not in ("int32", "torch.int32"):
        raise unsupported(f"GPTQ codes packed into {packed!r}", "int32")
    if table.get("rotation"):
        raise unsupported(f"the rotation {table['rotation']!r} of a GPTQ checkpoint", "none")
    settings = _gptq_settings(table, None)
    overrides = []
    dynamic = table.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise UnsupportedModel(f"config.json: dynamic of quantization_config is {dynamic!r}, not a table")
    for key, changes in dynamic.items():
        pattern = read_pattern(key.removeprefix("-:").removeprefix("+:"))
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
        raise unsupported(f"GPTQ in {bits!r} bits", "2, 3, 4 and 8")
    group_size = default.group_size if default and "group_size" not in table else read_group_size(table.get("group_size"))
    return GPTQSettings(
        bits=bits, group_size=group_size, symmetric=bool(table.get("sym", default.symmetric if default else False))
    )


def _awq(table: Mapping[str, Any]) -> AWQConfig:
    version = str(table.get("version") or table.get("checkpoint_format") or table.get("format") or "gemm").lower()
    if version != "gemm":
        raise unsupported(f"AWQ checkpoints of the version {version!r}", "gemm")
    if table.get("backend", "autoawq") != "autoawq":
        raise unsupported(f"AWQ checkpoints of the backend {table['backend']!r}", "autoawq")
    bits = table.get("bits", table.get("w_bit"))
    if bits != 4:
        raise unsupported(f"AWQ in {bits!r} bits", "4")
    return AWQConfig(group_size=read_group_size(table.get("group_size", table.get("q_group_size"))))
