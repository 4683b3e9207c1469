"""Linear layers on CPU over weights in oneDNN's blocked layout.

Measured for 1 to 128 rows, packed is never slower than `F.linear` (half the time or less up to 16 rows in bfloat16, at any
number in float32), so the packed copy is the only one kept. Adding the residual inside the product (oneDNN's binary post-op)
gains nothing.

A type that the processor cannot multiply is packed as float32, which costs twice the memory, keeps full precision and shows in
`nbytes`: bfloat16 without AVX512, and float16 without AVX512-FP16 or AVX-NE-CONVERT. `F.linear` in float16 is quicker there
for one row, and five times slower from 16 rows up.

Of bfloat16 layers `decode_layers` reads the same copy in place, where a probe finds it in the layout that it knows.

Libraries choose how to sum by the number of rows (one row is summed otherwise than two, where there are many inputs).
Deterministic mode therefore multiplies `TILE` rows at a time, always: then a row's place and its neighbours do not matter.
"""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer_kernels import dispatch

# Rows of a product in deterministic mode. Fewer would make prefills slower still, more a single row.
TILE = 16

BLOCK = 64  # outputs, see `PackedLinear.blocks`

_packers = torch.ops.mkldnn
_multiply = None
if torch.backends.mkldnn.is_available() and hasattr(_packers, "_linear_pointwise"):
    _multiply = _packers._linear_pointwise.default


def packed_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What weights of a type are packed as, which is what products of it are fast in; None: they are not packed."""
    if _multiply is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if dtype == torch.bfloat16 and not _packers._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not _packers._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


class PackedLinear:
    """One layer; see `launch.Linear`.

    Attributes:
        bias: [outputs], the type of products, or None.
    """

    takes = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        found = packed_dtype(weight.dtype)
        self._compute = found or weight.dtype
        self.bias = None if bias is None else bias.to(self._compute)
        self._packed = found is not None
        if self._packed:
            self._weight = _packers._reorder_linear_weight(weight.detach().to(self._compute).contiguous())
        else:
            self._weight = weight
        # Padding that the blocked layout may add is below a percent and cannot be asked for.
        elements = weight.numel() + (0 if bias is None else bias.numel())
        self.nbytes = elements * self._compute.itemsize

    @property
    def blocks(self) -> int | None:
        """The address of [ceil(outputs / 64), ceil(inputs / 32) * 16, 64, 2] bfloat16, which belong to the layer: blocks of 64
        outputs, two inputs of each side by side. None: weights are of another type, or lie otherwise."""
        if not self._packed or self._compute != torch.bfloat16 or not _in_blocks(self.out_features, self.in_features):
            return None
        return _packers.data_ptr(self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        y = x.to(self._compute)
        y = self._product_of_tiles(y) if dispatch.deterministic else self._product(y)
        return y.to(self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()

    def _product(self, x: Tensor) -> Tensor:
        if not self._packed:
            return F.linear(x, self._weight, self.bias)
        assert _multiply is not None
        return _multiply(x, self._weight, self.bias, "none", [], "")

    def _product_of_tiles(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        count = len(rows)
        if count % TILE:
            rows = F.pad(rows, (0, 0, 0, TILE - count % TILE))
        tiles = [self._product(tile) for tile in rows.split(TILE)]
        y = tiles[0] if len(tiles) == 1 else torch.cat(tiles)
        return y[:count].view(*x.shape[:-1], self.out_features)


@cache
def _in_blocks(outputs: int, inputs: int) -> bool:
    """Whether packed weights of a shape lie as `PackedLinear.blocks` says, by what becomes of some that are known."""
    if inputs % 2 or not hasattr(_packers, "data_ptr"):
        return False
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=numbers, dtype=torch.bfloat16)
    packed = _packers._reorder_linear_weight(weight)
    found = _memory(packed)
    shape = -(-outputs // BLOCK), -(-inputs // 32) * 16, BLOCK
    if found.numel() != shape[0] * shape[1] * shape[2]:
        return False
    blocks = found.view(shape).split(1)
    return all(
        torch.equal(block[0, : inputs // 2, : len(part)], part.view(torch.int32).T)
        for block, part in zip(blocks, weight.split(BLOCK), strict=True)
    )


def _memory(packed: Tensor) -> Tensor:
    """What a packed tensor holds, as int32, as long as it lives."""
    size = _packers._nbytes(packed)
    held = (ctypes.c_char * size).from_address(_packers.data_ptr(packed))
    return torch.frombuffer(held, dtype=torch.int32)
