"""A rank's share of one quantised matrix: which parts of its module's tensors belong to it, read and checked."""

import math

import torch
from torch import Tensor

from dashinfer.errors import UnsupportedModel
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import QuantizedWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # the types of scales, and of weights that are not quantised
_WORD = 32  # bits


class MatrixShare:
    """The share of one matrix that is to be read, and the tensors of its module."""

    def __init__(self, reader: WeightReader, part: Part, group_size: int | None) -> None:
        """`part.name` ends in `.weight`, which need not exist; `group_size`: inputs that share a scale, None: all.

        Raises:
            UnsupportedModel: the share cuts a group. The other methods raise it, too: the share cuts what they are about, or a
                tensor is missing, has another shape or type than expected, or makes no sense.
        """
        self._reader = reader
        self.name = part.name.removesuffix(".weight")
        self.outputs, self.inputs = part.shape
        self.rows = part.rows or (0, self.outputs)
        self.columns = part.columns or (0, self.inputs)
        self.width = self.columns[1] - self.columns[0]
        self.group_size = min(group_size or self.inputs, self.inputs)
        self.num_groups = -(-self.inputs // self.group_size)
        self.whole = part.columns is None
        if self.num_groups > 1:
            self.require(self.columns, self.inputs, self.group_size, "inputs", f"groups of {self.group_size}")

    def has(self, kind: str) -> bool:
        return f"{self.name}.{kind}" in self._reader

    def read(
        self,
        kind: str,
        shape: tuple[int, ...],
        types: tuple[torch.dtype, ...],
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Tensor:
        """Rows and columns of the tensor `kind` of the module, whose shape as a whole and type are checked."""
        name = f"{self.name}.{kind}"
        found = self._reader.read_stored(Part(name, shape, rows, columns))
        if found.dtype not in types:
            expected = " or ".join(_type_name(dtype) for dtype in types)
            raise UnsupportedModel(f"the tensor {name} is of the type {_type_name(found.dtype)}, where {expected} is expected")
        return found

    def which(self, kind: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape that a tensor has among these; the first where it has none of them, or does not exist."""
        name = f"{self.name}.{kind}"
        return next((shape for shape in shapes if name in self._reader and self._reader.shape(name) == shape), shapes[0])

    def scales(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Scales in float32, all of them; finite."""
        found = self.read(kind, shape, FLOATS).float()
        if not found.isfinite().all():
            raise UnsupportedModel(f"the tensor {self.name}.{kind} has scales that are not finite; the file is damaged")
        return found

    def skip(self, *kinds: str) -> None:
        self._reader.skip(*(f"{self.name}.{kind}" for kind in kinds))

    def share(self, groups: Tensor) -> Tensor:
        """The part of what there is for each output and group, [outputs, groups], that belongs to the share."""
        groups = groups[slice(*self.rows)]
        if self.num_groups > 1:
            groups = groups[:, self.columns[0] // self.group_size : -(-self.columns[1] // self.group_size)]
        return groups.contiguous()

    def require(self, share: tuple[int, int], size: int, step: int, things: str, pieces: str) -> None:
        """A share of `size` things begins and ends with a piece of `step` of them, or at the end of all."""
        if share[0] % step or (share[1] % step and share[1] != size):
            raise UnsupportedModel(
                f"{self.name} has its {size} {things} in {pieces}, which a share from {share[0]} to {share[1]} cuts; "
                "use a smaller --tensor-parallel"
            )

    def input_step(self, bits: int | None) -> int:
        """Inputs that cannot be divided: those of a group, and where codes of `bits` bits are in words, of a word."""
        group = self.group_size if self.num_groups > 1 else 1
        return math.lcm(group, 1 if bits is None else _codes_per_word(bits))

    def words(self, share: tuple[int, int], size: int, bits: int, things: str) -> tuple[int, int] | None:
        """Which words a share is in, of those that hold `size` integers one after the other; None: all."""
        if share == (0, size):
            return None
        per_word = _codes_per_word(bits)
        self.require(share, size, per_word, things, f"words of {per_word}")
        return share[0] * bits // _WORD, -(-share[1] * bits // _WORD)

    def integers(
        self, codes: Tensor, zeros: Tensor | None, scales: Tensor, bits: int, order: Tensor | None = None
    ) -> QuantizedWeight:
        """From unsigned codes of the share, [rows, columns] uint8, and what there is for all outputs and groups.

        Args:
            zeros: the codes that stand for 0; None: the middle one.
        """
        group_size = self.group_size if self.num_groups > 1 else self.width
        scales, offsets = self.share(scales), None
        if zeros is None:
            codes = (codes - 2 ** (bits - 1)).view(torch.int8)  # which wraps as it should
        else:
            offsets = -self.share(zeros).float() * scales
        return QuantizedWeight(codes=codes, scales=scales, offsets=offsets, bits=bits, group_size=group_size, order=order)

    def order(self, kind: str) -> Tensor | None:
        """The inputs sorted by their groups, from the tensor that has each one's; None: they are in order, or there is none."""
        if not self.has(kind) or self.num_groups == 1:
            self.skip(kind)
            return None
        groups = self.read(kind, (self.inputs,), (torch.int32, torch.int64)).long()
        expected = torch.arange(self.inputs, device=groups.device) // self.group_size
        if torch.equal(groups, expected):
            return None
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], expected):
            raise UnsupportedModel(
                f"the tensor {self.name}.{kind} does not have {self.group_size} inputs in each group; the file is damaged"
            )
        if not self.whole:
            raise UnsupportedModel(
                f"{self.name} has its inputs sorted by activation (desc_act), which --tensor-parallel cannot split yet"
            )
        return order


def _codes_per_word(bits: int) -> int:
    """After how many a word begins anew."""
    return _WORD // math.gcd(bits, _WORD)


def num_words(count: int, bits: int) -> int:
    """That `count` integers of `bits` bits take."""
    return -(-count * bits // _WORD)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
