"""A matrix in few bits, as every source of quantised weights gives it: the form between files and the devices' own layouts."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
# The greatest and least codes of a signed integer of so many bits.
RANGES = {2: (-2, 1), 3: (-4, 3), 4: (-8, 7), 8: (-128, 127)}


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedWeight:
    """`value[o, i] = codes[o, i] * scales[o // block_rows, i // group_size] + offsets[the same]`.

    Attributes:
        codes: [out_features, in_features], one code an element whatever its bits: int8 for signed codes (there are no offsets
            then), uint8 for unsigned ones, or float8_e4m3fn.
        scales: [ceil(out_features / block_rows), ceil(in_features / group_size)] float32.
        offsets: what code 0 stands for, the shape of `scales`, float32; None: 0.
        bits: of a code: 2, 3, 4 or 8.
        group_size: inputs that share a scale; in_features where a whole row does. The last group may be shorter.
        block_rows: outputs that share scales; more than 1 only for float8.
        order: [in_features] int64: column j holds the weights of input `order[j]`; None: of input j. (GPTQ's `desc_act`.)
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    bits: int = 8
    group_size: int
    block_rows: int = 1
    order: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.scales.shape == (-(-rows // self.block_rows), -(-columns // self.group_size))
        assert self.scales.dtype == torch.float32
        assert (self.codes.dtype == torch.uint8) == (self.offsets is not None)
        assert self.codes.dtype in (torch.uint8, torch.int8, FLOAT8)
        assert self.offsets is None or (self.offsets.shape == self.scales.shape and self.offsets.dtype == torch.float32)
        assert self.block_rows == 1 or self.codes.dtype == FLOAT8
        assert self.order is None or self.order.shape == (columns,)

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [out_features, in_features], columns in the order of the inputs; computed in float32, rounded once."""
        values = self.codes.float() * self._spread(self.scales)
        if self.offsets is not None:
            values += self._spread(self.offsets)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values.to(dtype)

    def _spread(self, groups: Tensor) -> Tensor:
        """[row blocks, groups] -> a value for each element."""
        rows, columns = self.codes.shape
        if self.block_rows > 1:
            groups = groups.repeat_interleave(self.block_rows, 0)[:rows]
        if groups.shape[1] == 1:
            return groups
        return groups.repeat_interleave(self.group_size, 1)[:, :columns]

    def pad_rows(self, rows: int) -> "QuantizedWeight":
        """With outputs of value 0 added, up to `rows` of them."""
        if rows == self.out_features:
            return self
        added = {"codes": rows - self.out_features, "scales": -(-rows // self.block_rows) - self.scales.shape[0]}
        added["offsets"] = added["scales"]
        padded = {
            name: None if (each := getattr(self, name)) is None else torch.cat((each, each.new_zeros(count, each.shape[1])))
            for name, count in added.items()
        }
        return replace(self, **padded)

    def to(self, device: torch.device) -> "QuantizedWeight":
        """The same on a device."""
        tensors = {name: getattr(self, name) for name in ("codes", "scales", "offsets", "order")}
        return replace(self, **{name: None if each is None else each.to(device) for name, each in tensors.items()})

    def fits(self, other: "QuantizedWeight") -> bool:
        """Whether the two can be one matrix, one below the other."""
        if self.block_rows > 1 and self.out_features % self.block_rows:
            return False
        return (
            self.codes.shape[1] == other.codes.shape[1]
            and self.codes.dtype == other.codes.dtype
            and (self.bits, self.group_size, self.block_rows) == (other.bits, other.group_size, other.block_rows)
            and (self.order is None) == (other.order is None)
            and (self.order is None or torch.equal(self.order, other.order))
        )


def concatenate(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One matrix of several that fit one another, one below the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    assert all(left.fits(right) for left, right in itertools.pairwise(weights))
    offsets = None if first.offsets is None else torch.cat([each.offsets for each in weights if each.offsets is not None])
    return replace(
        first,
        codes=torch.cat([each.codes for each in weights]),
        scales=torch.cat([each.scales for each in weights]),
        offsets=offsets,
    )
