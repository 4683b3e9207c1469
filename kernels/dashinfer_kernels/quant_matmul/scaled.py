"""Linear layers whose inputs and weights are both in 8 bits: which of their kernels runs, and how it is launched.

Choices depend on shapes alone, and sums of int8 are exact, so a row of int8 has the same bits whatever is computed with it. In
deterministic mode float8 has one kernel for any number of rows, too.
"""

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from dashinfer_kernels import dispatch, tuning
from dashinfer_kernels.quant_matmul.reference import ACTIVATION_TYPES, Activations
from dashinfer_kernels.quant_matmul.weight import FLOAT8, QuantizedWeight
from dashinfer_kernels.quantize_rows.launch import quantize_rows
from dashinfer_kernels.quantized_rows import QuantizedRows

BLOCK = 128  # outputs and inputs that share a scale, where blocks do
Generation = Literal["hopper", "ampere", "ada", "amd"]
# Rows up to which tiles hold them all.
_FEW_ROWS = 64
# Of `stream_kernel` with many rows: a step's time in those of `gemm_kernel`, and how many it takes to add up parts of tiles.
_STREAM_STEP = 1.2
_STREAM_ENDS = 10
# Of an int8 tile of 256 outputs: its time in those of one of 128.
_WIDE_TILE = 1.75


@dataclass(frozen=True)
class Config:
    """Launch parameters. A step is `block_in` inputs of a tile; `programs` a multiprocessor, of the stream form."""

    form: Literal["stream", "gemm"]
    block_rows: int
    block_out: int
    num_warps: int
    num_stages: int
    programs: int = 1
    block_in: int = 128
    group_rows: int = 8  # tiles of rows that share their weights in the cache


def configs(activations: Activations, generation: Generation) -> dict[str, Config]:
    """All that are launched on such GPUs, by name: for at most so many rows, and for many."""
    if generation == "hopper":
        wide = Config("gemm", 128, 256, 8, 4)
        return {
            "16": Config("stream", 16, 128, 4, 5, programs=2),
            "32": Config("stream", 32, 128, 4, 4, programs=2),
            "64": Config("stream", 64, 128, 4, 3, programs=2),
            "stream": Config("stream", 128, 128, 8, 4),
            # a float8 turn takes two steps
            "gemm": Config("gemm", 128, 128, 8, 3 if activations == "fp8" else 5),
            **({"wide": wide} if activations == "int8" else {}),
        }
    # shared memory: 163 KiB of an A100, 99 KiB of others, 64 KiB
    few, many = {"ampere": (4, 4), "ada": (3, 3), "amd": (2, 2)}[generation]
    programs = {"ampere": 2, "ada": 1, "amd": 1}[generation]
    gemm = Config("gemm", 128, 128, 8, many)
    if activations == "fp8":
        gemm = replace(gemm, block_out=64)
    return {
        **{str(rows): Config("stream", rows, 128, 4, few, programs=programs) for rows in (16, 32, 64)},
        "stream": Config("stream", 64, 128, 8, few),
        "gemm": gemm,
    }


def choose_form(
    rows: int, out_features: int, in_features: int, activations: Activations, generation: Generation, multiprocessors: int
) -> str:
    """The heuristic: a name in `configs`.

    Few rows cost the time of reading the weights. Many have tiles enough for all multiprocessors. In between, a tile for each
    leaves some idle, and equal shares of all the work are worth adding up the tiles that they cut.
    """
    known = configs(activations, generation)
    if rows <= _FEW_ROWS:
        return str(max(16, 1 << (rows - 1).bit_length()))
    steps = -(-in_features // BLOCK)

    def tiles(config: Config) -> int:
        return -(-rows // config.block_rows) * -(-out_features // config.block_out)

    times = {"gemm": float(-(-tiles(known["gemm"]) // multiprocessors) * steps)}
    if "wide" in known:
        times["wide"] = -(-tiles(known["wide"]) // multiprocessors) * steps * _WIDE_TILE
    stream = known["stream"]
    size = stream.block_rows * stream.block_out / (known["gemm"].block_rows * known["gemm"].block_out)
    times["stream"] = (tiles(stream) * steps / multiprocessors * size) * _STREAM_STEP + _STREAM_ENDS
    return min(times, key=lambda name: times[name])


def multiplies(weight: QuantizedWeight, activations: Activations | None) -> bool:
    """Whether the kernels here are for such weights and inputs, on the weights' device.

    Scales are those of whole rows or, of float8, of 128 x 128 blocks. Float8 needs tensor cores that multiply it, in the format
    that files have it in: NVIDIA's from compute capability 8.9 on.
    """
    if activations is None or weight.codes.dtype != ACTIVATION_TYPES[activations][0]:
        return False
    if weight.order is not None or weight.offsets is not None or weight.in_features % 16:
        return False
    if weight.codes.dtype == FLOAT8 and not _has_float8(weight.codes.device):
        return False
    if weight.block_rows == 1:
        return weight.scales.shape[1] == 1
    return weight.block_rows == weight.group_size == BLOCK


class ScaledLinear:
    """A layer of whose weight `multiplies` is true. Keeps the codes as they are, and scales in float32."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, activations: Activations) -> None:
        assert multiplies(weight, activations)
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self.takes: Activations | None = activations
        self._codes, self._scales, self._bias, self._dtype = weight.codes.contiguous(), weight.scales.contiguous(), bias, dtype
        self._use_blocks = weight.block_rows == BLOCK
        device = self._codes.device
        self._generation, self._multiprocessors = _generation(device), _multiprocessors(device)
        self._configs = configs(activations, self._generation)
        programs = self._multiprocessors * max(config.programs for config in self._configs.values())
        self._arrived = torch.zeros(programs, dtype=torch.int32, device=device)
        self._descriptors: dict[int, Any] = {}  # of the codes, by the outputs of a tile
        tensors = (self._codes, self._scales, self._bias, self._arrived)
        self.nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        """[..., in_features] or so many quantised rows, to [..., out_features] of the layer's type."""
        return self._multiply(x, self._dtype)

    def wide(self, x: Tensor | QuantizedRows) -> Tensor:
        """As `__call__`, to float32, rounded to nothing narrower before."""
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor | QuantizedRows, dtype: torch.dtype) -> Tensor:
        assert self.takes is not None
        if isinstance(x, QuantizedRows):
            shape, x_rows = x.values.shape, x
        else:
            shape, x_rows = x.shape, quantize_rows(x.reshape(-1, self.in_features), self.takes)
        out = torch.empty((*shape[:-1], self.out_features), dtype=dtype, device=self._codes.device)
        if len(x_rows.values) == 0:
            return out
        assert x_rows.values.shape[1] == self.in_features and x_rows.values.dtype == self._codes.dtype
        assert x_rows.values.is_contiguous()
        family = (self.takes, dtype, self._bias is None, self._use_blocks, self._generation, self._codes.device)
        if family not in _compiled:
            _compiled.add(family)
            for name, config in self._configs.items():
                if self._fixed_form is None or name == self._fixed_form:
                    self._launch(x_rows, out, config)  # a smaller tile of more rows is a tile still
        self._launch(x_rows, out, self._config(len(x_rows.values)))
        return out

    @property
    def _fixed_form(self) -> str | None:
        """In deterministic mode, where the form matters."""
        return "gemm" if dispatch.deterministic and self.takes == "fp8" else None

    def _config(self, rows: int) -> Config:
        if self._fixed_form is not None:
            return self._configs[self._fixed_form]
        tiles = rows if rows <= _FEW_ROWS else -(-rows // BLOCK) * BLOCK
        assert self.takes is not None
        form = _form(tiles, self.out_features, self.in_features, self.takes, self._generation, self._multiprocessors)
        return self._configs[form]

    def _launch(self, x: QuantizedRows, out: Tensor, config: Config) -> None:
        rows = len(x.values)
        tiles = -(-rows // config.block_rows) * -(-self.out_features // config.block_out)
        left, right = x.values, self._codes
        use_descriptors = self._generation == "hopper"
        if use_descriptors:
            right = self._descriptors.get(config.block_out)
            if right is None:
                right = self._descriptors[config.block_out] = _descriptor(self._codes, config.block_out, config.block_in)
            left = _descriptor(x.values, config.block_rows, config.block_in)
        arguments = {
            "x": left,
            "weight": right,
            "x_scales_ptr": x.scales,
            "weight_scales_ptr": self._scales,
            "bias_ptr": self._scales if self._bias is None else self._bias,
            "out_ptr": out,
            "rows": rows,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_OUT": config.block_out,
            "BLOCK_IN": config.block_in,
            "USE_INT8": self.takes == "int8",
            "USE_BLOCKS": self._use_blocks,
            "USE_BIAS": self._bias is not None,
            "USE_DESCRIPTORS": use_descriptors,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        if config.form == "gemm":
            _kernels().gemm_kernel[(tiles,)](GROUP_ROWS=config.group_rows, **arguments)
            return
        programs = min(tiles * -(-self.in_features // config.block_in), self._multiprocessors * config.programs)
        partial = torch.empty(
            (programs, 2, config.block_out, config.block_rows),
            dtype=torch.int32 if self.takes == "int8" else torch.float32,
            device=out.device,
        )
        _kernels().stream_kernel[(programs,)](partial_ptr=partial, arrived_ptr=self._arrived, **arguments)


# What kernels have been compiled for: with its first call, a layer has all of them compiled that its like may need.
_compiled: set[tuple[object, ...]] = set()


@lru_cache(maxsize=4096)
def _form(
    rows: int, out_features: int, in_features: int, activations: Activations, generation: Generation, multiprocessors: int
) -> str:
    key = (activations, 1 << (rows - 1).bit_length(), out_features, in_features)
    tuned = None if dispatch.deterministic else tuning.lookup("scaled_linear", key)
    if tuned is not None:
        return tuned["form"]
    return choose_form(rows, out_features, in_features, activations, generation, multiprocessors)


@cache
def _kernels() -> ModuleType:
    from dashinfer_kernels.quant_matmul import kernel_scaled

    return kernel_scaled


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, [rows, columns])


@cache
def _generation(device: torch.device) -> Generation:
    if device.type != "cuda":
        return "hopper"  # interpreted
    if torch.version.hip is not None:
        return "amd"
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 0), (8, 7)):
        return "ampere"
    # 12 is Blackwell without a data center's shared memory
    return "hopper" if (9, 0) <= capability < (12, 0) else "ada"


def _has_float8(device: torch.device) -> bool:
    if device.type != "cuda":
        return True  # interpreted
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
