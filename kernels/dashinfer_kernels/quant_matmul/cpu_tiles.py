"""Linear layers over 4- and 8-bit codes on CPUs that multiply bfloat16 (AVX512-BF16), by compiled loops.

Codes become bfloat16 exactly, and products are summed in float32. A row is summed in one order in a block of four rows and in
another by itself, so in other company its last bit may differ; deterministic mode has no tiles. Many rows are multiplied with
values, rounded to bfloat16, of 64 outputs at a time: each thread unpacks its own into its second-level cache. A row is then
summed in one order in any company.

Measured (`bench/results/cpu-quantized-linear.md`): ms of SmolLM2-135M's 120 layers on 2 cores.

| rows | 16 | 32 | 105 | 128 | 512 |
|---|---|---|---|---|---|
| bfloat16, packed | 14 | 22 | 58 | 75 | 280 |
| 8 bits a row | 17 | 25 | 64 | 79 | 310 |
| 8 bits, groups of 32 | 16 | 25 | 66 | 77 | 302 |
| 4 bits | 16 | 24 | 63 | 77 | 295 |
"""

import warnings
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import loops
from dashinfer_kernels.quant_matmul.cpu_blocks import CpuLinear, centred
from dashinfer_kernels.quant_matmul.weight import FLOAT8, QuantizedWeight

TILE = 16  # outputs, see `tile_product`

_ANY = 1 << 30  # rows

# The most rows that codes are multiplied with faster than their values are, and than a packed 16-bit copy is, by planes.
ROWS, ROWS_BESIDE_COPY = {1: 16, 2: 8}, {1: 8, 2: 6}


def fits(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether there are loops for the weights, on this processor."""
    if weight.codes.dtype == FLOAT8 or weight.in_features % weight.group_size:
        return False
    whole = weight.group_size % (8 if weight.bits <= 4 else 4) == 0
    return whole and has_loops(dtype)


class TileLinear(CpuLinear):
    """Codes in tiles; see `launch.Linear`.

    Attributes:
        tiles: [ceil(outputs / 16), groups, bytes] uint8.
        planes: 1 for codes of at most four bits, 2 for eight.
        in_order: whether codes are in the order of the inputs.
        wide_bias: [outputs] float32, or None.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self.planes = 1 if weight.bits <= 4 else 2
        self.most_rows, self.most_rows_beside_copy = ROWS[self.planes], ROWS_BESIDE_COPY[self.planes]
        codes, offsets = centred(weight)
        codes = codes.view(torch.uint8) + (8 if self.planes == 1 else 128)
        self.tiles = _pack(codes, weight.scales, torch.zeros_like(weight.scales) if offsets is None else offsets, self.planes)

        self.in_order = weight.order is None
        self.wide_bias = None if bias is None else bias.float()

    def wide(self, x: Tensor) -> Tensor:
        if x.ndim == 2 and self.in_order and self._bias is None and len(x) <= self.most_rows:
            return self._few(x.contiguous(), torch.float32)
        return self(x).float()

    def _product(self, rows: Tensor) -> Tensor:
        if len(rows) <= self.most_rows:
            return self._few(rows, torch.bfloat16)
        loop = _loop()
        assert loop is not None
        return loop.multiply_many(rows, self.tiles, self.out_features, self.planes)

    def _few(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        loop = _loop()
        assert loop is not None
        return loop.multiply(rows, self.tiles, self.out_features, self.planes, dtype)


def _pack(codes: Tensor, scales: Tensor, offsets: Tensor, planes: int) -> Tensor:
    """Tiles of codes [outputs, inputs] uint8, and of what goes with them, [outputs, groups] float32."""
    outputs, inputs = codes.shape
    groups, padding = scales.shape[1], -outputs % TILE
    codes = F.pad(codes, (0, 0, 0, padding)).view(-1, TILE, inputs * planes // 8, 8 // planes)
    if planes == 1:  # two codes a byte: those of one input and of the next but one
        low, high = codes.unflatten(3, (2, 2, 2)).unbind(4)
        codes = (low | high << 4).flatten(3)
    # of an output's word, the lower half has every other input, the upper half the others
    words = codes.unflatten(3, (2, 2)).transpose(3, 4).permute(0, 2, 1, 3, 4).reshape(len(codes), groups, -1)
    heads = [F.pad(each, (0, 0, 0, padding)).to(torch.bfloat16).view(-1, TILE, groups).mT for each in (scales, offsets)]
    return torch.cat((*(each.contiguous().view(torch.uint8) for each in heads), words), 2)


def has_loops(dtype: torch.dtype) -> bool:
    """Whether compiled loops multiply any number of rows of a type on this processor."""
    return loops.take(dtype, _ANY) and _loop() is not None


@cache
def _loop() -> ModuleType | None:
    """None: it cannot be had, for a reason that costs a warning unless it is the processor."""
    try:
        from dashinfer_kernels.quant_matmul import tile_product

        if not tile_product.available():
            return None
        from dashinfer_kernels.quant_matmul import cpu_tile_loop
    # whatever a Numba or an LLVM raises that does not have what is asked of it
    except Exception as error:
        warnings.warn(f"Numba cannot compile loops, so layers take longer: {error!r}", RuntimeWarning, stacklevel=2)
        return None
    return cpu_tile_loop
