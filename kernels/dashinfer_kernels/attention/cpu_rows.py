"""The paged cache as rows that one indexed copy gathers, and what the codes of a quantised one stand for.

A *cache row* is one KV head's tile of one block, keys or values. Codes are widened as they are, which is exact in every
floating type, and their scales stay apart: there is one a token and head, so that multiplying scores and weights with them
costs less than keys and values. Torch widens float8 element by element; here its bits are moved to where a float16 has them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# The exponent of a float16 with the bits of a float8 is smaller by 8; its subnormal numbers are too.
_FLOAT8_FACTOR = 2.0**8
_FLOAT8_BITS = -0x4001  # of an int16: all but the copy of the sign beside it
_WIDENED = 1 << 18  # float8 codes at once: what lies between codes and values stays in the processor's cache


@dataclass(frozen=True)
class CacheRows:
    """The cache of a layer.

    Attributes:
        held: [rows, block_size * head_dim], what is stored; int8 for codes of either type.
        scales: [rows, block_size] float32; None for a cache that is not quantised.
        dtype: of the cache.
    """

    held: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, kv_cache: Tensor, kv_scales: Tensor | None) -> "CacheRows":
        """Args: as of `launch.paged_attention`."""
        _, _, _, block_size, head_dim = kv_cache.shape
        if kv_scales is None:
            return cls(kv_cache.view(-1, block_size * head_dim), None, kv_cache.dtype)
        held = kv_cache.view(torch.int8).view(-1, block_size * head_dim)  # indexing knows no float8
        return cls(held, kv_scales.view(-1, block_size), kv_cache.dtype)

    @property
    def factor(self) -> float:
        """What widened codes are to be multiplied with besides their scale."""
        return _FLOAT8_FACTOR if self.dtype == torch.float8_e4m3fn else 1.0

    def gather_scales(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, block_size] `dtype`, what the rows' widened codes are multiplied with."""
        assert self.scales is not None
        scales = self.scales.index_select(0, rows).to(dtype)
        return scales if self.factor == 1 else scales.mul_(self.factor)

    def gather(self, rows: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
        """[rows, block_size * head_dim] `dtype`, the values that the rows stand for."""
        held = self.held.index_select(0, rows)
        if self.scales is None:
            return held.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        values = self.widen(held, torch.empty(held.shape, dtype=wide)).view(len(rows), -1, head_dim)
        return values.mul_(self.gather_scales(rows, wide).unsqueeze(-1)).view(held.shape).to(dtype)

    def widen(self, codes: Tensor, out: Tensor) -> Tensor:
        """Write gathered rows of `held` to `out`, of a floating type: values without their scales, divided by `factor`."""
        if self.dtype != torch.float8_e4m3fn:
            return out.copy_(codes)
        step = max(1, _WIDENED // codes.shape[1])
        for low in range(0, len(codes), step):
            bits = codes[low : low + step].to(torch.int16).mul_(128).bitwise_and_(_FLOAT8_BITS)
            out[low : low + step] = bits.view(torch.float16).to(torch.float32)
        return out
