"""Linear layers on CPU over any quantised weights: blocks of outputs become wide in the cache, and are multiplied there.

It is the path for many rows of the layers in `cpu.py`, and the only one for weights that no kernel of torch multiplies as they
are: float8, groups of 16, float32 activations. Blocks lie inputs by outputs: the scales of a group are then a vector along the
memory, which takes half the time of the other way around.

Types: values are computed in float32 and rounded once to the type of the product. That is bfloat16 for 16-bit activations,
float16 included, and float32 for float32 activations and where the processor has no bfloat16; scales and offsets are of it too.
"""

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch
from dashinfer_kernels.linear.cpu import TILE, packed_dtype
from dashinfer_kernels.quant_matmul.weight import FLOAT8, QuantizedWeight

# Elements of a block: in bfloat16 half of a core's second-level cache of 1 MiB. Its outputs are a multiple of BLOCK_STEP,
# half of which are what torch's loops over bfloat16 take at once: what is left over takes many times as long.
BLOCK_ELEMENTS, BLOCK_STEP = 2**18, 128
PADDED_TO = 64  # outputs

_workspaces = threading.local()

# The bits of an E4M3 number, moved to the places of a bfloat16's, are that number times this.
_FLOAT8_UNIT = 2.0**-120
_FLOAT8_BITS = -0x7810  # 0x87f0 in 16 bits: sign, the last four bits of the exponent, the first three of the mantissa


class CpuLinear:
    """What the layers share: inputs as rows in the order of the codes, and the bias, type and shape of outputs."""

    takes = None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.out_features, weight.in_features
        self._dtype = dtype
        self._compute = torch.float32 if dtype == torch.float32 else torch.bfloat16
        self._bias = None if bias is None else bias.to(self._compute)
        self._order = weight.order

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values() if isinstance(tensor, Tensor))

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 2:
            return self(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        if self._order is not None:
            x = x.index_select(1, self._order)
        y = self._product(x.to(self._compute).contiguous())
        if self._bias is not None:
            y = y.add_(self._bias)
        return y.to(self._dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()

    def _product(self, rows: Tensor) -> Tensor:
        """[rows, in_features] to a new [rows, out_features], both of the type `_compute`."""
        raise NotImplementedError


class BlockLinear(CpuLinear):
    """Weights in blocks, codes of at most four bits two a byte; see `launch.Linear`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self._float8 = weight.codes.dtype == FLOAT8
        self._halves = 2 if weight.bits <= 4 else 1
        self._product_dtype = packed_dtype(self._compute) or self._compute
        self._padding = -self.in_features % weight.group_size
        outputs = -(-self.out_features // PADDED_TO) * PADDED_TO
        columns = block_columns(self.in_features)
        self._widths = [min(columns, outputs - start) for start in range(0, outputs, columns)]
        codes, offsets = centred(weight)
        codes = F.pad(codes, (0, self._padding, 0, outputs - self.out_features))
        blocks = [block.T.contiguous() for block in codes.split(self._widths)]
        if self._halves == 2:
            blocks = [_pair(block) for block in blocks]
        self._codes = torch.cat([block.view(-1) for block in blocks])
        self._scales = self._groups(weight, weight.scales / _FLOAT8_UNIT if self._float8 else weight.scales, outputs)
        self._offsets = None if offsets is None else self._groups(weight, offsets, outputs)

    def _groups(self, weight: QuantizedWeight, values: Tensor, outputs: int) -> Tensor:
        """[row blocks, groups] to [groups, outputs] of the product's type."""
        spread = values.repeat_interleave(weight.block_rows, 0)[: self.out_features]
        return F.pad(spread, (0, 0, 0, outputs - self.out_features)).T.to(self._product_dtype).contiguous()

    def _product(self, rows: Tensor) -> Tensor:
        rows = F.pad(rows, (0, self._padding)) if self._padding else rows
        y = torch.cat(multiply_blocks(rows.to(self._product_dtype), self._blocks()), 1)
        return y[:, : self.out_features].to(self._compute)

    def _blocks(self) -> Iterator[Tensor]:
        inputs = self.in_features + self._padding
        groups = len(self._scales)
        size = inputs * self._widths[0]
        buffer = workspace("values", size, self._product_dtype)
        scratch = workspace("codes", size, torch.int16 if self._float8 else torch.int8)
        start = position = 0
        for width in self._widths:
            size = inputs * width
            codes = self._codes[position : position + size // self._halves]
            position += len(codes)
            if self._halves == 2:
                codes = split_pairs(codes, scratch[:size])
            elif self._float8:
                codes = _float8_as_bfloat16(codes, scratch[:size])
            width //= self._halves
            for block in buffer[:size].copy_(codes).view(self._halves, groups, -1, width):
                outputs = slice(start, start + width)
                offsets = None if self._offsets is None else self._offsets[:, None, outputs]
                yield scale_block(block, self._scales[:, None, outputs], offsets)
                start += width


def workspace(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """[size] elements that this thread uses for every layer: memory asked for anew must be mapped and cleared each time."""
    key = name, dtype
    found = _workspaces.__dict__.get(key)
    if found is None or len(found) < size:
        with torch.inference_mode(False):  # or it could be written nowhere else
            found = _workspaces.__dict__[key] = torch.empty(size, dtype=dtype)
    return found[:size]


def block_columns(inputs: int) -> int:
    """Outputs of a block, of so many inputs."""
    return max(BLOCK_ELEMENTS // inputs // BLOCK_STEP, 1) * BLOCK_STEP


def scale_block(codes: Tensor, scales: Tensor, offsets: Tensor | None) -> Tensor:
    """Values in place of codes.

    Args:
        codes: [groups, group size, outputs], contiguous.
        scales: [groups, 1, outputs] of the same type.
        offsets: as `scales`, or None.

    Returns:
        [inputs, outputs].
    """
    if offsets is None:
        codes.mul_(scales)
    else:
        torch.addcmul(offsets, codes, scales, out=codes)
    return codes.flatten(0, 1)


def multiply_blocks(rows: Tensor, blocks: Iterator[Tensor]) -> list[Tensor]:
    """`rows @ block` for each block: in deterministic mode `TILE` rows at a time.

    Args:
        rows: [rows, inputs].
        blocks: [inputs, some outputs] each, of the type of `rows`; one may overwrite the one before.
    """
    if not dispatch.deterministic:
        return [rows @ block for block in blocks]
    count = len(rows)
    tiles = F.pad(rows, (0, 0, 0, -count % TILE)).split(TILE)
    return [torch.cat([tile @ block for tile in tiles])[:count] for block in blocks]


def centred(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes in int8, around 0 (float8 ones: their bits), and the offsets that go with them, which are small and round well."""
    if weight.offsets is None:
        return weight.codes.view(torch.int8), None
    middle = 2 ** (weight.bits - 1)
    return (weight.codes - middle).view(torch.int8), weight.offsets + middle * weight.scales


def _pair(codes: Tensor) -> Tensor:
    """[inputs, 2 n] codes of -8 to 7 to [inputs, n] bytes, one of the first n below one of the others."""
    low, high = (codes + 8).chunk(2, 1)
    return low | high << 4


def split_pairs(pairs: Tensor, out: Tensor) -> Tensor:
    """[n] bytes to the codes below and above, each less 8.

    Args:
        out: [2 n], of either type of 8 bits.

    Returns:
        `out` as int8.
    """
    pairs, codes = pairs.view(torch.uint8), out.view(torch.uint8)
    low, high = codes.chunk(2)
    torch.bitwise_and(pairs, 15, out=low)
    torch.bitwise_right_shift(pairs, 4, out=high)
    return codes.sub_(8).view(torch.int8)


def _float8_as_bfloat16(codes: Tensor, out: Tensor) -> Tensor:
    """E4M3 numbers times `_FLOAT8_UNIT`; torch's own conversion takes eight times as long."""
    out.copy_(codes).bitwise_left_shift_(4).bitwise_and_(_FLOAT8_BITS)
    return out.view(torch.bfloat16)
