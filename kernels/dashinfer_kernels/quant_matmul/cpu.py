"""Linear layers over quantised weights on CPU: torch's kernels that read the codes as they are, where there is one.

| layer | weights | few rows | many rows |
|---|---|---|---|
| `TileLinear` | 8 bits or fewer in groups of a multiple of 8; bfloat16 on AVX512-BF16 | compiled loops | the same |
| `NibbleLinear` | 4 bits or fewer, or 8, in groups of a multiple of 32 | `_weight_int4pack_mm_for_cpu` | blocks |
| `RowLinear` | 8 bits, a scale an output | `_weight_int8pack_mm` | blocks |
| `IntegerLinear` | 8 bits, a scale an output, int8 activations | oneDNN's int8 product | the same |
| `BlockLinear` | any other; float32 activations | blocks | blocks |

Tiles are `cpu_tiles.py`'s, and take the place of the next two where there are loops, but in deterministic mode. Blocks are
`cpu_blocks.py`'s. The two other weight-only kernels are vectorised for bfloat16 alone (AVX2 and AVX512), keep scales in
bfloat16 and round outputs to it; float16 activations go through bfloat16. Their time grows with every row, and passes that of
blocks at the number of rows below. A row's sums are the same in any company, so deterministic mode uses them for any number.

Measured (`bench/results/cpu-quantized-linear.md`): ms of SmolLM2-135M's 120 layers (106M weights) on 2 cores with AVX512-BF16.

| rows | 1 | 16 | 32 | 64 | 128 |
|---|---|---|---|---|---|
| bfloat16, packed | 9.9 | 14 | 22 | 40 | 66 |
| 4 bits, kernel | 3.7 | 21 | 40 | 80 | 158 |
| 4 bits, blocks | | | 112 | 131 | 168 |
| 8 bits in groups, kernel | 7.7 | 43 | 83 | 163 | 323 |
| 8 bits in groups, blocks | 112 | 123 | 133 | 153 | 187 |
| 8 bits a row, kernel | 8.4 | 38 | 60 | | |
| 8 bits a row, blocks | 31 | 41 | 52 | 73 | 107 |

Four bits become blocks in one pass of a compiled loop where there is one (see `loops`; not in the table), which beats the
kernel from 65 rows on: a prefill of 105 tokens then takes 138 ms rather than 183, of 400 tokens at most 576 rather than 720.

Eight bits are two planes of four for the 4-bit kernel: `x` twice beside itself, times the upper and the lower halves of codes.
"""

from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch, loops
from dashinfer_kernels.linear.cpu import PackedLinear, packed_dtype
from dashinfer_kernels.linear.launch import Linear
from dashinfer_kernels.quant_matmul.cpu_blocks import (
    BlockLinear,
    CpuLinear,
    block_outputs,
    centred,
    workspace,
)
from dashinfer_kernels.quant_matmul.cpu_tiles import TileLinear, fits
from dashinfer_kernels.quant_matmul.reference import Activations, quantize_rows
from dashinfer_kernels.quant_matmul.weight import FLOAT8, QuantizedWeight

# The most rows that the kernels multiply faster than blocks do, and than a packed 16-bit copy does.
NIBBLE_ROWS, NIBBLE_ROWS_BESIDE_COPY = {1: 128, 2: 56}, {1: 8, 2: 2}
NIBBLE_ROWS_WITH_LOOPS = 64  # of one plane, where blocks are unpacked by loops
ROW_ROWS, ROW_ROWS_BESIDE_COPY = 24, 2

_LEAST_SCALE = torch.finfo(torch.float32).tiny

# Groups that the 4-bit kernel knows, the best first.
_GROUPS = (256, 128, 64, 32)


def pack_on_cpu(
    weight: QuantizedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
    activations: Activations | None,
    *,
    wide_copy: bool = False,
) -> Linear:
    """See `launch.pack_quantized`. Float8 activations are not rounded: nothing here multiplies float8 faster for it.

    Args:
        wide_copy: keep the weights in `dtype` as well, for numbers of rows that are multiplied faster by those.
    """
    per_row = weight.codes.dtype == torch.int8 and weight.bits == 8 and weight.scales.shape[1] == 1
    if activations == "int8":
        if per_row and _multiplies_integers():
            return IntegerLinear(weight, bias, dtype)
        return RoundedInputs(pack_on_cpu(weight, bias, dtype, None, wide_copy=wide_copy))
    narrow: TileLinear | NibbleLinear | RowLinear | None = None
    if dtype != torch.float32:
        if fits(weight, dtype):
            narrow = TileLinear(weight, bias, dtype)
        elif per_row and weight.in_features % 16 == 0:
            narrow = RowLinear(weight, bias, dtype)
        elif _kernel_group(weight) and _kernel_tile():
            narrow = NibbleLinear(weight, bias, dtype)
    if not wide_copy:
        return narrow or BlockLinear(weight, bias, dtype)
    copy = PackedLinear(weight.dequantize(dtype), bias)
    return copy if narrow is None else BesideCopy(narrow, copy)


class NibbleLinear(CpuLinear):
    """Codes two a byte: tiles of outputs, in each an input's codes side by side; see `launch.Linear`.

    Outputs are padded to whole tiles.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        tile, self._group = _kernel_tile(), _kernel_group(weight)
        assert tile and self._group
        self._tile = tile
        self._product_dtype = packed_dtype(self._compute) or self._compute
        self._planes = 1 if weight.bits <= 4 else 2
        self.most_rows, self.most_rows_beside_copy = NIBBLE_ROWS[self._planes], NIBBLE_ROWS_BESIDE_COPY[self._planes]
        if self._takes_loops(NIBBLE_ROWS[1]):
            self.most_rows = min(self.most_rows, NIBBLE_ROWS_WITH_LOOPS)
        codes, offsets = centred(weight)
        codes = codes.view(torch.uint8) + (8 if self._planes == 1 else 128)
        scales, offsets = weight.scales, torch.zeros_like(weight.scales) if offsets is None else offsets
        padding = -self.out_features % tile
        codes = F.pad(codes, (0, 0, 0, padding))
        scales, offsets = (_spread(each, weight.group_size // self._group, padding) for each in (scales, offsets))
        if self._planes == 1:
            self._codes, self._scales = _pack_nibbles(codes, tile), torch.stack((scales, offsets), -1)
        else:
            # Less 8 each, the halves h and l of a code c make 16 h + l = c - 136: 8 less than it is from the middle.
            upper, lower = torch.stack((16 * scales, offsets), -1), torch.stack((scales, 8 * scales), -1)
            self._codes = _pack_nibbles(torch.cat((codes >> 4, codes & 15), 1), tile)
            self._scales = torch.cat((upper, lower))

    def _product(self, rows: Tensor) -> Tensor:
        if dispatch.deterministic or len(rows) <= self.most_rows:
            return self.few(rows)
        return self._many_by_loops(rows) if self._takes_loops(len(rows)) else self._many(rows)

    def _takes_loops(self, rows: int) -> bool:
        return self._planes == 1 and loops.take(self._product_dtype, rows)

    def few(self, rows: Tensor) -> Tensor:
        if self._planes == 2:
            rows = torch.cat((rows, rows), 1)
        y = torch._weight_int4pack_mm_for_cpu(rows, self._codes, self._group, self._scales)
        return y if y.shape[1] == self.out_features else y[:, : self.out_features].contiguous()

    def _many_by_loops(self, rows: Tensor) -> Tensor:
        inputs, tile = self.in_features, self._tile
        pairs = self._codes.view(-1, inputs, tile // 2)
        count = max(block_outputs(inputs) // tile, 1)
        buffer = workspace("values", count * inputs * tile, torch.bfloat16)
        y = rows.new_empty(len(rows), len(pairs) * tile)
        for start in range(0, len(pairs), count):
            part = pairs[start : start + count]
            outputs = len(part) * tile
            values = buffer[: inputs * outputs].view(inputs, outputs)
            _loop().unpack_nibbles(part, self._scales, start, self._group, values)
            torch.mm(rows, values, out=y[:, start * tile : start * tile + outputs])
        return y if y.shape[1] == self.out_features else y[:, : self.out_features].contiguous()

    def _many(self, rows: Tensor) -> Tensor:
        wide = self._product_dtype
        rows = rows.to(wide)
        tiles = [torch.bmm(rows.expand(len(block), -1, -1), block) for block in self._blocks(wide)]
        y = torch.cat(tiles).transpose(0, 1).reshape(len(rows), -1)
        return y[:, : self.out_features].to(self._compute)

    def _blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """[some tiles, inputs, outputs of a tile]; the next overwrites it."""
        inputs, tile = self.in_features, self._tile
        groups = inputs // self._group
        # The scales of the lower plane and the offsets of the upper are those of a whole code from its middle.
        parts = self._scales[-groups:, :, 0], self._scales[:groups, :, 1]
        scales, offsets = (part.to(dtype).view(groups, -1, 1, tile).transpose(0, 1).contiguous() for part in parts)
        pairs = self._codes.view(-1, self._planes, inputs, tile // 2)
        count = max(block_outputs(inputs) // tile, 1)
        codes = workspace("codes", count * inputs * tile, torch.uint8).view(count, inputs, 2, -1)
        spare = workspace("spare", count * inputs * tile // 2, torch.uint8).view(count, inputs, -1)
        buffer = workspace("values", count * inputs * tile, dtype).view(count, inputs, 2, -1)
        for start in range(0, len(pairs), count):
            part = pairs[start : start + count]
            found = len(part)
            if self._planes == 1:
                integers = _split_nibbles(part[:, 0], codes[:found])
            else:
                integers = _join_planes(part[:, 0], part[:, 1], codes[:found], spare[:found])
            values = buffer[:found].copy_(integers).view(found, groups, self._group, tile)
            where = slice(start, start + found)
            yield torch.addcmul(offsets[where], values, scales[where], out=values).view(found, inputs, tile)


class RowLinear(CpuLinear):
    """Codes as they are, [out_features, in_features]; see `launch.Linear`."""

    most_rows, most_rows_beside_copy = ROW_ROWS, ROW_ROWS_BESIDE_COPY

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        # the kernel's loads are aligned ones, and codes may lie anywhere in a file's memory
        self._codes = _aligned(weight.codes.contiguous())
        self._scales = weight.scales.view(-1).to(self._compute)

    def _product(self, rows: Tensor) -> Tensor:
        return self.few(rows) if dispatch.deterministic or len(rows) <= self.most_rows else self._many(rows)

    def few(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(_aligned(rows), self._codes, self._scales)

    def _many(self, rows: Tensor) -> Tensor:
        wide = packed_dtype(self._compute) or self._compute
        rows = rows.to(wide)
        columns = block_outputs(self.in_features)
        buffer = workspace("values", columns * self.in_features, wide).view(columns, self.in_features)
        parts = [F.linear(rows, buffer[: len(codes)].copy_(codes)) for codes in self._codes.split(columns)]
        return torch.cat(parts, 1).mul_(self._scales).to(self._compute)


class IntegerLinear:
    """Codes in oneDNN's layout, times int8 activations; see `launch.Linear`."""

    takes = None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self._dtype = dtype
        self._bias = None if bias is None else bias.float()
        self._order = weight.order
        self._codes = torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None)
        self._scales = weight.scales.view(-1).clone()
        self._zeros = torch.zeros(self.out_features, dtype=torch.int32)
        others = (self._scales, self._zeros, self._bias, self._order)
        self.nbytes = weight.codes.nbytes + sum(tensor.nbytes for tensor in others if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x).to(self._dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._order is not None:
            rows = rows.index_select(1, self._order)
        values, scales = _quantize_rows(rows)
        y = torch.ops.onednn.qlinear_pointwise.default(
            values, 1.0, 128, self._codes, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(scales)
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.view(*x.shape[:-1], self.out_features)


class RoundedInputs:
    """A layer whose inputs are rounded to int8, row by row, and multiplied in their own type."""

    takes = None

    def __init__(self, layer: Linear) -> None:
        self.in_features, self.out_features, self.nbytes = layer.in_features, layer.out_features, layer.nbytes
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        values, scales = quantize_rows(x.reshape(-1, self.in_features), "int8")
        return self._layer((values * scales.unsqueeze(-1)).to(x.dtype).view(x.shape))

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()


class BesideCopy:
    """Few rows times the codes, more times a copy in 16 bits. In deterministic mode the copy serves nothing."""

    takes = None

    def __init__(self, narrow: TileLinear | NibbleLinear | RowLinear, copy: PackedLinear) -> None:
        self.in_features, self.out_features = narrow.in_features, narrow.out_features
        self.nbytes = narrow.nbytes + copy.nbytes
        self.narrow, self._copy = narrow, copy

    def __call__(self, x: Tensor) -> Tensor:
        few = x.numel() <= self.narrow.most_rows_beside_copy * self.in_features
        return self.narrow(x) if few or dispatch.deterministic else self._copy(x)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()


def _quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` to int8 in fewer passes. Scales are [rows, 1], that of a row of zeros is any.

    Values are plus 128, in uint8: oneDNN's product of signed ones takes hundreds of times as long.
    """
    wide = rows.float()
    scales = torch.linalg.vector_norm(wide, torch.inf, -1, keepdim=True).div_(127.0).clamp_(min=_LEAST_SCALE)
    return wide.div(scales).round_().add_(128.0).to(torch.uint8), scales


def _aligned(x: Tensor) -> Tensor:
    return x.clone() if x.data_ptr() % 64 else x


@cache
def _loop() -> ModuleType:
    from dashinfer_kernels.quant_matmul import cpu_loop

    return cpu_loop


@cache
def _kernel_tile() -> int | None:
    """Outputs of the 4-bit kernel's tiles on this processor, if it keeps them as `_pack_nibbles` does."""
    codes = torch.arange(128 * 32, dtype=torch.uint8).view(128, 32) * 7 % 16
    expected = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return next((tile for tile in (64, 32) if torch.equal(_pack_nibbles(codes, tile), expected.view(torch.uint8))), None)


@cache
def _multiplies_integers() -> bool:
    """Whether sums of int8 products are exact and fast here."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def _kernel_group(weight: QuantizedWeight) -> int | None:
    """The group size that the 4-bit kernel multiplies the weights in, if it can."""
    if weight.codes.dtype == FLOAT8 or weight.in_features % weight.group_size:
        return None
    return next((size for size in _GROUPS if weight.group_size % size == 0), None)


def _spread(values: Tensor, times: int, padding: int) -> Tensor:
    """[outputs, groups] to [more groups, more outputs] bfloat16."""
    return F.pad(values.repeat_interleave(times, 1), (0, 0, 0, padding)).T.to(torch.bfloat16)


def _pack_nibbles(codes: Tensor, tile: int) -> Tensor:
    """[outputs, inputs] codes of 0 to 15 to [outputs, inputs // 2] bytes, as the 4-bit kernel reads them.

    For each tile of outputs: [inputs, tile // 2] bytes, the first half of the outputs below the second.
    """
    low, high = codes.view(-1, 2, tile // 2, codes.shape[1]).unbind(1)
    return (low | high << 4).transpose(1, 2).contiguous().view(len(codes), -1)


def _split_nibbles(pairs: Tensor, out: Tensor) -> Tensor:
    """Bytes [tiles, inputs, n] to the codes below and above, each less 8, in `out` [tiles, inputs, 2, n], as int8."""
    torch.bitwise_and(pairs, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(pairs, 4, out=out[:, :, 1])
    return out.sub_(8).view(torch.int8)


def _join_planes(upper: Tensor, lower: Tensor, out: Tensor, spare: Tensor) -> Tensor:
    """Bytes of the codes' upper and lower halves to the codes below and above, each less 128, as `_split_nibbles`."""
    low, high = out.unbind(2)
    torch.bitwise_left_shift(upper, 4, out=low)
    torch.bitwise_and(lower, 15, out=spare)
    low.bitwise_or_(spare)
    torch.bitwise_and(upper, 0xF0, out=high)
    torch.bitwise_right_shift(lower, 4, out=spare)
    high.bitwise_or_(spare)
    return out.bitwise_xor_(128).view(torch.int8)
