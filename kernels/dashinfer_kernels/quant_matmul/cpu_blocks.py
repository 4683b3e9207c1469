"""Linear layers on CPU over any quantised weights: blocks of outputs become wide in the cache, and are multiplied there.

It is the path for many rows of the layers in `cpu.py`, and the only one for weights that no kernel of torch multiplies as they
are: float8, groups of 16, float32 activations. Every pass over a block, and its product, is shared by torch's threads in the
same way, by outputs: a pass that is not waits for what lies in the other core's cache, and takes several times as long.

Types: values are of the type of the product. That is bfloat16 for 16-bit activations, float16 included, and float32 for float32
activations and where the processor has no bfloat16. Scales and offsets are bfloat16 for 16-bit activations.
"""

import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch
from dashinfer_kernels.linear.cpu import TILE, packed_dtype
from dashinfer_kernels.quant_matmul.weight import FLOAT8, QuantizedWeight

# Elements of a block: in bfloat16 half of a core's second-level cache of 1 MiB.
BLOCK_ELEMENTS = 2**18

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
    """Weights [outputs, inputs], codes of at most four bits two a byte; see `launch.Linear`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self._float8 = weight.codes.dtype == FLOAT8
        self._product_dtype = packed_dtype(self._compute) or self._compute
        self._padding = -self.in_features % weight.group_size
        codes, offsets = centred(weight)
        codes = F.pad(codes, (0, self._padding)) if self._padding else codes
        self._paired = weight.bits <= 4 and codes.shape[1] % 2 == 0
        self._codes = _pair(codes) if self._paired else codes.contiguous()
        self._scales = self._groups(weight, weight.scales / _FLOAT8_UNIT if self._float8 else weight.scales)
        self._offsets = None if offsets is None else self._groups(weight, offsets)

    def _groups(self, weight: QuantizedWeight, values: Tensor) -> Tensor:
        """[row blocks, groups] to [outputs, groups, 1] of the type of activations."""
        values = values.to(self._compute)
        return values.repeat_interleave(weight.block_rows, 0)[: self.out_features].unsqueeze(-1)

    def _product(self, rows: Tensor) -> Tensor:
        rows = F.pad(rows, (0, self._padding)).to(self._product_dtype)
        if not dispatch.deterministic:
            return torch.cat([F.linear(rows, block) for block in self._blocks()], 1).to(self._compute)
        count = len(rows)
        tiles = F.pad(rows, (0, 0, 0, -count % TILE)).split(TILE)
        y = [torch.cat([F.linear(tile, block) for tile in tiles])[:count] for block in self._blocks()]
        return torch.cat(y, 1).to(self._compute)

    def _blocks(self) -> Iterator[Tensor]:
        """[some outputs, inputs]; the next overwrites it."""
        inputs = self.in_features + self._padding
        outputs = block_outputs(inputs)
        buffer = workspace("values", outputs * inputs, self._product_dtype).view(outputs, inputs)
        scratch = workspace("codes", outputs * inputs, torch.int16 if self._float8 else torch.int8).view(outputs, inputs)
        for start in range(0, self.out_features, outputs):
            part = slice(start, start + outputs)
            codes = self._codes[part]
            if self._paired:
                codes = _split(codes, scratch[: len(codes)])
            elif self._float8:
                codes = _float8_as_bfloat16(codes, scratch[: len(codes)])
            block = buffer[: len(codes)].copy_(codes)
            values = block.view(len(codes), self._scales.shape[1], -1).mul_(self._scales[part])
            if self._offsets is not None:
                values.add_(self._offsets[part])
            yield block


def workspace(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """[size] elements that this thread uses for every layer: memory asked for anew must be mapped and cleared each time."""
    key = name, dtype
    found = _workspaces.__dict__.get(key)
    if found is None or len(found) < size:
        with torch.inference_mode(False):  # or it could be written nowhere else
            found = _workspaces.__dict__[key] = torch.empty(size, dtype=dtype)
    return found[:size]


def block_outputs(inputs: int) -> int:
    """Outputs of a block, of so many inputs."""
    return max(BLOCK_ELEMENTS // inputs // 16, 1) * 16


def centred(weight: QuantizedWeight) -> tuple[Tensor, Tensor | None]:
    """Codes in int8, around 0 (float8 ones: their bits), and the offsets that go with them, which are small and round well."""
    if weight.offsets is None:
        return weight.codes.view(torch.int8), None
    middle = 2 ** (weight.bits - 1)
    return (weight.codes - middle).view(torch.int8), weight.offsets + middle * weight.scales


def _pair(codes: Tensor) -> Tensor:
    """[outputs, 2 n] codes of -8 to 7 to [outputs, n] bytes, one of the first n below one of the others."""
    low, high = (codes + 8).chunk(2, 1)
    return low | high << 4


def _split(pairs: Tensor, out: Tensor) -> Tensor:
    """What `_pair` made, to `out`, in int8."""
    low, high = out.view(torch.uint8).chunk(2, 1)
    torch.bitwise_and(pairs.view(torch.uint8), 15, out=low)
    torch.bitwise_right_shift(pairs.view(torch.uint8), 4, out=high)
    return out.sub_(8)


def _float8_as_bfloat16(codes: Tensor, out: Tensor) -> Tensor:
    """E4M3 numbers times `_FLOAT8_UNIT`; torch's own conversion takes eight times as long."""
    out.copy_(codes).bitwise_left_shift_(4).bitwise_and_(_FLOAT8_BITS)
    return out.view(torch.bfloat16)
