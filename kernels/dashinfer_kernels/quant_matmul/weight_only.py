"""Layers on a GPU whose weights have few bits and whose activations keep 16 or 32.

Weights are packed once, into 16-bit words that hold one code of each of 2 or 4 runs of columns (`kernel_weight_only` says why);
no other copy is kept. Three forms, by the number of rows (`choose_config`): few rows read each weight once and scale sums; more
scale the weights in registers; very many are multiplied by the library, after a kernel has written the weights out in 16 bits,
which costs the time of 200 rows and takes memory only meanwhile.
"""

import math
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch, tuning
from dashinfer_kernels.linear.launch import PlainLinear
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES, QuantizedWeight

Config = dict[str, Any]
OUT_MULTIPLE = 64  # outputs are padded to it
FEW_ROWS = 64
LEAST_STEPS = 4  # of a split
INTERPRETED = 4  # multiprocessors where there are none
UNPACKED_ROWS = 1024  # from here on the library multiplies
UNPACKED_BYTES = 256 << 20  # of weights written out at a time
ZERO_TOLERANCE = 0.01  # of a step, within which an offset counts as a whole number of them


class WeightOnlyLinear:
    """One layer; see `linear.launch.Linear`.

    Args:
        weight: on the layer's device. Codes of 2 and 3 bits are kept as 4. Groups: a whole row, or a multiple of 16.
        bias: [out_features] of `dtype`, or None.
        dtype: of inputs and outputs: float16, bfloat16 or float32.
    """

    takes: Activations | None = None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        assert can_pack(weight)
        assert bias is None or (bias.shape == (weight.out_features,) and bias.dtype == dtype)
        self.out_features, self.in_features, self.dtype = weight.out_features, weight.in_features, dtype
        self._bias, self._order = bias, weight.order
        self.kind = "float8" if weight.codes.dtype == FLOAT8 else "int8" if weight.bits == 8 else "int4"
        self.places = 4 if self.kind == "int4" else 2
        whole = weight.group_size >= self.in_features
        self.sub = 64 if whole else math.gcd(weight.group_size, 64)
        step = self.places * self.sub
        self.steps = -(-self.in_features // step)
        self.group_size = self.steps * step if whole else weight.group_size
        self._out_padded = -(-self.out_features // OUT_MULTIPLE) * OUT_MULTIPLE
        codes, offsets = _unsigned_codes(weight)
        self._words = pack_words(codes, self.places, self.sub, self.steps, self._out_padded)
        zeros = None if offsets is None or self.kind != "int4" else _whole_zeros(weight.scales, offsets)
        groups = -(-(self.steps + 1) * step // self.group_size)  # a step more than there is: values are loaded ahead
        scale_stride = -(-self._out_padded // weight.block_rows)
        self._scales = _by_group(_narrow(weight.scales), groups, scale_stride)
        self.offsets = "none" if offsets is None else "offsets" if zeros is None else "zeros"
        self._offsets = self._words
        if offsets is not None:
            self._offsets = _by_group(_narrow(offsets) if zeros is None else zeros, groups, self._out_padded)
        self._scales_at_end = whole and self.offsets != "offsets"
        self._layout = {
            "IN_FEATURES": self.in_features,
            "GROUP_SIZE": self.group_size,
            "SCALE_ROWS": weight.block_rows,
            "SUB": self.sub,
            "PLACES": self.places,
            "KIND": self.kind,
            "OFFSETS": self.offsets,
        }
        tensors = {id(each): each for each in (self._words, self._scales, self._offsets, self._order, bias) if each is not None}
        self.nbytes = sum(each.nbytes for each in tensors.values())
        # while memory is measured, and before graphs are captured
        for rows in (16, FEW_ROWS, *range(2 * FEW_ROWS, UNPACKED_ROWS, 2 * FEW_ROWS)):
            self._shared_sums(self._heuristic(None if dispatch.deterministic else rows), rows)

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._multiply(x, torch.float32)

    def _multiply(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert x.shape[-1] == self.in_features and x.dtype == self.dtype
        x_rows = x.reshape(-1, self.in_features)
        x_rows = x_rows.contiguous() if self._order is None else x_rows.index_select(1, self._order)
        rows = len(x_rows)
        if rows == 0:
            return torch.empty(*x.shape[:-1], self.out_features, dtype=out_dtype, device=x.device)
        self._compile(out_dtype)
        return self._multiply_rows(x_rows, out_dtype, self.config(rows)).view(*x.shape[:-1], self.out_features)

    def _multiply_rows(self, x: Tensor, out_dtype: torch.dtype, config: Config | None) -> Tensor:
        if config is None:
            return self._multiply_unpacked(x, out_dtype)
        return self._multiply_packed(x, out_dtype, config)

    def _compile(self, out_dtype: torch.dtype) -> None:
        """With the first call of layers like this one, have the kernels of all numbers of rows compiled."""
        device = self._words.device
        like = (device, out_dtype, self.dtype, self._bias is None, self._scales.dtype, self._offsets.dtype, self.out_features)
        like += (*self._layout.values(), dispatch.deterministic)
        if device.type != "cuda" or like in _compiled or torch.cuda.is_current_stream_capturing():
            return
        _compiled.add(like)
        for rows in (*(1 << power for power in range(UNPACKED_ROWS.bit_length())), UNPACKED_ROWS - 1):
            x = torch.zeros(rows, self.in_features, dtype=self.dtype, device=device)
            self._multiply_rows(x, out_dtype, self.config(rows, _measured))

    def config(self, rows: int, lookup: Callable[..., Config | None] | None = None) -> Config | None:
        """Launch parameters for so many rows; None: the library multiplies unpacked weights.

        Args:
            lookup: where measured ones are; None: `tuning.lookup`.
        """
        shape_only = dispatch.deterministic
        bucket = 0 if shape_only else _power_of_two(rows)
        key = (self.kind, str(self.dtype), self.offsets, self.group_size, self.out_features, self.in_features, bucket)
        found = (lookup or tuning.lookup)("weight_only", key)
        if found is not None:
            return None if found["UNPACK"] else found
        return self._heuristic(None if shape_only else rows)

    def _heuristic(self, rows: int | None) -> Config | None:
        return choose_config(
            rows,
            self.out_features,
            self.steps,
            wide=self.dtype == torch.float32,
            shifted=self.offsets != "none",
            multiprocessors=_multiprocessors(self._words.device),
            generation=_generation(self._words.device),
        )

    def _multiply_packed(self, x: Tensor, out_dtype: torch.dtype, config: Config) -> Tensor:
        rows, device = len(x), self._words.device
        out = torch.empty(rows, self.out_features, dtype=out_dtype, device=device)
        tiles = -(-rows // config["BLOCK_ROWS"]) * -(-self.out_features // config["BLOCK_OUT"])
        shared, splits = self._shared_sums(config, rows), self._splits(config)
        partial, arrivals = shared or (out, out)
        scale = "end" if self._scales_at_end else "weights" if self.offsets == "offsets" else config["SCALE"]
        nvidia = _generation(device) in ("hopper", "ampere", "ada")
        _kernel().weight_only_kernel[(tiles, splits if shared else 1)](
            x_ptr=x,
            words_ptr=self._words,
            scales_ptr=self._scales,
            offsets_ptr=self._offsets,
            bias_ptr=out if self._bias is None else self._bias,
            out_ptr=out,
            partial_ptr=partial,
            arrivals_ptr=arrivals,
            rows=rows,
            out_features=self.out_features,
            out_padded=self._out_padded,
            scale_stride=self._scales.shape[1],
            splits=splits,
            **self._layout,
            SCALE=scale,
            BLOCK_ROWS=config["BLOCK_ROWS"],
            BLOCK_OUT=config["BLOCK_OUT"],
            BLOCK_WORDS=min(config["BLOCK_WORDS"], self.sub),
            GROUP_ROWS=config["GROUP_ROWS"],
            USE_SHARED_SPLITS=shared is not None,
            USE_SERIAL_SPLITS=splits > 1 and shared is None,
            USE_BIAS=self._bias is not None,
            USE_PTX=nvidia and self.dtype != torch.float32,
            PRECISION="tf32x3" if nvidia else "ieee",
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        return out

    def _splits(self, config: Config) -> int:
        return min(config["SPLITS"], self.steps)

    def _shared_sums(self, config: Config | None, rows: int) -> tuple[Tensor, Tensor] | None:
        """The workspace of programs that share tiles; None: none do.

        Where tiles alone occupy the GPU, a program computes all splits of its tile: the same bits.
        """
        if config is None or (splits := self._splits(config)) == 1:
            return None
        block_rows, block_out, device = config["BLOCK_ROWS"], config["BLOCK_OUT"], self._words.device
        tiles = -(-rows // block_rows) * -(-self.out_features // block_out)
        if tiles >= _multiprocessors(device):
            return None
        return _workspace(device).take(tiles * splits * block_rows * block_out, tiles)

    def _multiply_unpacked(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        pieces = -(-self.out_features * self.in_features * x.itemsize // UNPACKED_BYTES)
        size = -(-self.out_features // pieces // 128) * 128
        out = torch.empty(len(x), self.out_features, dtype=out_dtype, device=x.device)
        for first in range(0, self.out_features, size):
            last = min(first + size, self.out_features)
            weights, bias, target = self.unpack(first, last), None, out[:, first:last]
            if self._bias is not None:
                bias = self._bias[first:last]
            if out_dtype != x.dtype:
                target.copy_(PlainLinear(weights, bias).wide(x))
            elif bias is None:
                torch.mm(x, weights.t(), out=target)
            else:
                torch.addmm(bias, x, weights.t(), out=target)
        return out

    def unpack(self, first: int, last: int) -> Tensor:
        """The weights of some outputs, [last - first, in_features] of `dtype`, columns in the order of the codes."""
        weights = torch.empty(last - first, self.in_features, dtype=self.dtype, device=self._words.device)
        _kernel().unpack_kernel[(self.steps, -(-(last - first) // OUT_MULTIPLE))](
            words_ptr=self._words,
            scales_ptr=self._scales,
            offsets_ptr=self._offsets,
            out_ptr=weights,
            first_out=first,
            last_out=last,
            out_padded=self._out_padded,
            scale_stride=self._scales.shape[1],
            **self._layout,
            BLOCK_OUT=OUT_MULTIPLE,
        )
        return weights


_measured = tuning.lookup  # of this GPU; while a bench tunes, `tuning.lookup` is what it tries
# Layers like those whose kernels have been compiled.
_compiled: set[tuple[object, ...]] = set()


def can_pack(weight: QuantizedWeight) -> bool:
    """Whether `WeightOnlyLinear` takes a matrix: its groups are whole rows or multiples of 16."""
    return weight.group_size >= weight.in_features or weight.group_size % 16 == 0


def choose_config(
    rows: int | None, out_features: int, steps: int, *, wide: bool, shifted: bool, multiprocessors: int, generation: str
) -> Config | None:
    """Launch parameters for layers that no bench has measured; None where the library multiplies faster.

    Tiles of 128 outputs read the activations half as often as tiles of 64, and are taken where that leaves every multiprocessor
    two programs of four steps; for that many programs sums are split. In many rows the activations' tiles are the larger ones:
    two programs of one warp group each fit on a multiprocessor of Hopper, and one converts while the other multiplies.

    Args:
        rows: of the activations; None: a choice that is good for few and the same for all.
        steps: rows of words that an output has.
        wide: for float32, whose products take no tensor cores.
        shifted: whether codes have zeros or offsets, which large tiles keep in registers, too.
        generation: "hopper", "ampere" (and what has its instructions and no less shared memory), "ada" (the same, with 99 KiB
            of it), "amd" or "interpreter".
    """
    wanted = 2 * multiprocessors
    many = rows is not None and rows > FEW_ROWS
    if rows is not None and rows >= UNPACKED_ROWS:
        return None
    if wide:
        block_rows, block_out, num_warps = 32, 64, 4
    elif many:
        block_rows, block_out, num_warps = 128, 128, 4 if generation == "hopper" else 8
    else:
        block_rows = FEW_ROWS if rows is None else max(16, _power_of_two(rows))
        block_out = 128 if -(-out_features // 128) * (steps // LEAST_STEPS) >= wanted else 64
        num_warps = 8 if block_rows * block_out > 64 * 64 else 4
    block_words = 32 if wide or many else 64  # or as many as there are
    if shifted and not wide and block_rows >= FEW_ROWS and generation in ("ampere", "ada"):
        block_words //= 2
    tiles = -(-out_features // block_out) * (1 if rows is None else -(-rows // block_rows))
    return {
        "BLOCK_ROWS": block_rows,
        "BLOCK_OUT": block_out,
        "BLOCK_WORDS": block_words,
        "GROUP_ROWS": 8,
        "SPLITS": max(1, min(wanted // tiles, steps // LEAST_STEPS)),
        "SCALE": "weights" if many else "sums",
        "num_warps": num_warps,
        "num_stages": 2 if wide or generation == "amd" else 3 if block_out == 128 or generation == "ada" else 4,
    }


def pack_words(codes: Tensor, places: int, sub: int, steps: int, out_padded: int) -> Tensor:
    """Codes to the words that the kernels read.

    Args:
        codes: [out_features, in_features] uint8, below 16 where `places` is 4.

    Returns:
        [steps, out_padded, sub] int16: word [s, o, j] holds, from its low bits up, the codes of output o and the inputs
        `(s * places + p) * sub + j` of each place p. Codes that do not exist are 0.
    """
    outputs, inputs = codes.shape
    padded = F.pad(codes, (0, steps * places * sub - inputs)).view(outputs, steps, places, sub)
    words = torch.zeros(steps, out_padded, sub, dtype=torch.int16, device=codes.device)
    for place in range(places):
        shifted = padded[:, :, place].to(torch.int32) << (16 // places * place)
        words[:, :outputs] |= shifted.to(torch.int16).transpose(0, 1)
    return words


def _unsigned_codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes as the kernels take them, uint8, and what 0 of an unsigned code stands for; signed ones have no offsets."""
    if weight.codes.dtype == FLOAT8:
        return weight.codes.view(torch.uint8), None
    if weight.offsets is not None:
        return weight.codes, weight.offsets
    return (weight.codes.to(torch.int16) - RANGES[max(weight.bits, 4)][0]).to(torch.uint8), None


def _whole_zeros(scales: Tensor, offsets: Tensor) -> Tensor | None:
    """The codes that stand for 0, uint8, if all are whole numbers; a kernel then subtracts them exactly."""
    zeros = torch.where(scales == 0, 0.0, -offsets / scales).round_()
    whole = ((offsets + zeros * scales).abs() <= ZERO_TOLERANCE * scales.abs()).all() & (zeros >= 0).all() & (zeros < 128).all()
    return zeros.to(torch.uint8) if whole else None


def _narrow(values: Tensor) -> Tensor:
    """In float16 if nothing is lost."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values


def _by_group(values: Tensor, groups: int, stride: int) -> Tensor:
    """[outputs, some groups] -> [groups, stride], padded with zeros."""
    return F.pad(values.t(), (0, stride - len(values), 0, groups - values.shape[1])).contiguous()


def _power_of_two(count: int) -> int:
    """The least that is not less than `count`."""
    return 1 << (count - 1).bit_length()


@cache
def _kernel() -> ModuleType:
    from dashinfer_kernels.quant_matmul import kernel_weight_only

    return kernel_weight_only


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else INTERPRETED


@cache
def _generation(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "amd"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] == 9:
        return "hopper"
    return "ampere" if capability in ((8, 0), (8, 7)) or (10, 0) <= capability < (12, 0) else "ada"


class _Workspace:
    """Memory for the sums of programs that share a tile, and how many of them have arrived. Layers in one stream take turns.

    The counts are zero between launches: the last program of a tile sees to it. What is outgrown is kept: a captured graph may
    write to it.
    """

    def __init__(self, device: torch.device) -> None:
        self._partials = [torch.empty(0, device=device)]
        self._arrivals = [torch.zeros(0, dtype=torch.int32, device=device)]

    def take(self, partials: int, tiles: int) -> tuple[Tensor, Tensor]:
        """At least so many float32 and so many int32 counts."""
        if partials > len(self._partials[-1]):
            self._partials.append(self._partials[-1].new_empty(_power_of_two(partials)))
        if tiles > len(self._arrivals[-1]):
            self._arrivals.append(self._arrivals[-1].new_zeros(_power_of_two(tiles)))
        return self._partials[-1], self._arrivals[-1]


@cache
def _workspace(device: torch.device) -> _Workspace:
    return _Workspace(device)
