"""Quantised matrices as checkpoints keep them: GPTQ's and AWQ's words, and integers or float8 numbers with scales.

Which tensors a module has says whether it is quantised; the config only says how. A share of a matrix is read, not the whole of
it; one that cuts a group of inputs, a block or a word is refused. Layouts of devices are made elsewhere, from the
`QuantizedWeight`s that come from here.
"""

import math

import torch
from torch import Tensor

from dashinfer.errors import UnsupportedModel
from dashinfer.models.linears import WeightFormat
from dashinfer.models.quantized_config import (
    AWQConfig,
    CheckpointQuantization,
    GPTQConfig,
    ScaledConfig,
    ScaledWeights,
)
from dashinfer.models.unpack import unpack, unpack_awq, unpack_zeros
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import QuantizedWeight
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quant_matmul.weight import FLOAT8

_WORD = 32  # bits
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def checkpoint_format(quantization: CheckpointQuantization) -> WeightFormat:
    """The reader of a checkpoint's matrices."""
    if isinstance(quantization, GPTQConfig):
        return GPTQFormat(quantization)
    if isinstance(quantization, AWQConfig):
        return AWQFormat(quantization)
    return ScaledFormat(quantization)


class _Matrix:
    """The share of one matrix that is to be read, and the tensors of its module."""

    def __init__(self, reader: WeightReader, part: Part, group_size: int | None) -> None:
        """`group_size`: inputs that share a scale; None: all."""
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
        """A tensor of the module, checked."""
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
        """Scales in float32, all of them."""
        found = self.read(kind, shape, _FLOATS).float()
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

    def words(self, share: tuple[int, int], size: int, bits: int, things: str) -> tuple[int, int] | None:
        """Which words a share is in, of those that hold `size` integers one after the other; None: all."""
        if share == (0, size):
            return None
        per_word = _WORD // math.gcd(bits, _WORD)  # integers after which a word begins anew
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


class GPTQFormat:
    """`qweight` [inputs / 32 * bits, outputs], `qzeros` [groups, outputs / 32 * bits], `scales` [groups, outputs], `g_idx`."""

    activations: Activations | None = None
    head = True

    def __init__(self, config: GPTQConfig) -> None:
        self._config = config

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        name = part.name.removesuffix(".weight")
        if f"{name}.qweight" not in reader:
            return _unquantised(reader, part, "qweight")
        settings = self._config.of(name)
        if settings is None:
            raise UnsupportedModel(f"the tensor {name}.qweight is quantised, but config.json says that {name} is not")
        bits = settings.bits
        matrix = _Matrix(reader, part, settings.group_size)
        order = matrix.order("g_idx")
        words = matrix.words(matrix.columns, matrix.inputs, bits, "inputs")
        shape = (_num_words(matrix.inputs, bits), matrix.outputs)
        packed = matrix.read("qweight", shape, (torch.int32,), words, part.rows)
        codes = unpack(packed.T, bits, matrix.width)
        zeros = None
        if settings.symmetric:  # the middle, whatever was written: some files of version 1 do not have it less 1
            matrix.skip("qzeros")
        else:
            shape = (matrix.num_groups, _num_words(matrix.outputs, bits))
            packed = matrix.read("qzeros", shape, (torch.int32,))
            zeros = unpack_zeros(
                packed,
                bits,
                matrix.outputs,
                less_one=self._config.zeros_less_one,
                misplaced=self._config.zeros_misplaced,
            ).T
        scales = matrix.scales("scales", (matrix.num_groups, matrix.outputs)).T
        if order is not None:
            codes = codes[:, order]
        return matrix.integers(codes, zeros, scales, bits, order)


class AWQFormat:
    """`qweight` [inputs, outputs / 8], `qzeros` [groups, outputs / 8], `scales` [groups, outputs]."""

    activations: Activations | None = None
    head = True

    def __init__(self, config: AWQConfig) -> None:
        self._config = config

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        matrix = _Matrix(reader, part, self._config.group_size)
        if not matrix.has("qweight"):
            return _unquantised(reader, part, "qweight")
        words = matrix.words(matrix.rows, matrix.outputs, 4, "outputs")
        shape = (matrix.inputs, _num_words(matrix.outputs, 4))
        packed = matrix.read("qweight", shape, (torch.int32,), part.columns, words)
        codes = unpack_awq(packed).T[: matrix.rows[1] - matrix.rows[0]].contiguous()
        shape = (matrix.num_groups, _num_words(matrix.outputs, 4))
        zeros = unpack_awq(matrix.read("qzeros", shape, (torch.int32,))).T[: matrix.outputs]
        scales = matrix.scales("scales", (matrix.num_groups, matrix.outputs)).T
        return matrix.integers(codes, zeros, scales, 4)


class ScaledFormat:
    """`weight` of 8 bits, or `weight_packed` [outputs, inputs / 32 * bits], with `weight_scale` or `weight_scale_inv` (which is
    the same) and perhaps `weight_zero_point`."""

    head = True

    def __init__(self, config: ScaledConfig) -> None:
        self.activations: Activations | None = config.activations
        self._config = config

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        name = part.name.removesuffix(".weight")
        packed = f"{name}.weight_packed" in reader
        if not packed:
            if part.name not in reader:
                return _unquantised(reader, part, "weight_packed")
            if reader.stored_type(part.name) in _FLOATS:
                return None
        weights = self._config.of(name)
        if weights is None:
            kind = "weight_packed" if packed else "weight"
            raise UnsupportedModel(f"the tensor {name}.{kind} is quantised, but config.json says that {name} is not")
        matrix = _Matrix(reader, part, weights.group_size)
        matrix.skip("input_scale", "input_zero_point", "output_scale", "activation_scale")
        if packed:
            return self._packed(matrix, part, weights)
        return self._plain(matrix, part, weights)

    def _packed(self, matrix: _Matrix, part: Part, weights: ScaledWeights) -> QuantizedWeight:
        bits = weights.bits
        if bits is None:
            raise UnsupportedModel(f"{matrix.name} has packed integers, but config.json makes them float8")
        shape = matrix.read("weight_shape", (2,), (torch.int64, torch.int32)).tolist()
        if shape != [matrix.outputs, matrix.inputs]:
            raise UnsupportedModel(
                f"the tensor {matrix.name}.weight_shape says {shape}, "
                f"but the model's config makes it {[matrix.outputs, matrix.inputs]}"
            )
        order = matrix.order("weight_g_idx")
        words = matrix.words(matrix.columns, matrix.inputs, bits, "inputs")
        stored = (matrix.outputs, _num_words(matrix.inputs, bits))
        codes = unpack(matrix.read("weight_packed", stored, (torch.int32,), part.rows, words), bits, matrix.width)
        if order is not None:
            codes = codes[:, order]
        zeros = None
        if not weights.symmetric:
            zeros = self._zeros(matrix, bits)
        else:
            matrix.skip("weight_zero_point")
        return matrix.integers(codes, zeros, self._scales(matrix, weights), bits, order)

    def _plain(self, matrix: _Matrix, part: Part, weights: ScaledWeights) -> QuantizedWeight:
        expected = FLOAT8 if weights.bits is None else torch.int8
        codes = matrix.read("weight", part.shape, (expected,), part.rows, part.columns)
        scales = self._scales(matrix, weights)
        if weights.symmetric:
            matrix.skip("weight_zero_point")
            if weights.scale == "block":
                return self._blocks(matrix, codes, scales, weights.block_rows)
            group_size = matrix.group_size if matrix.num_groups > 1 else matrix.width
            return QuantizedWeight(codes=codes, scales=matrix.share(scales), bits=weights.bits or 8, group_size=group_size)
        assert weights.bits is not None
        middle = 2 ** (weights.bits - 1)
        return matrix.integers(codes.view(torch.uint8) + middle, self._zeros(matrix, weights.bits), scales, weights.bits)

    def _blocks(self, matrix: _Matrix, codes: Tensor, scales: Tensor, block_rows: int) -> QuantizedWeight:
        matrix.require(matrix.rows, matrix.outputs, block_rows, "outputs", f"blocks of {block_rows}")
        columns = slice(matrix.columns[0] // matrix.group_size, -(-matrix.columns[1] // matrix.group_size))
        scales = scales[matrix.rows[0] // block_rows : -(-matrix.rows[1] // block_rows), columns].contiguous()
        return QuantizedWeight(codes=codes, scales=scales, group_size=matrix.group_size, block_rows=block_rows)

    def _scales(self, matrix: _Matrix, weights: ScaledWeights) -> Tensor:
        """For each output and group; for each block where there are any."""
        kind = "weight_scale" if matrix.has("weight_scale") else "weight_scale_inv"
        blocks = -(-matrix.outputs // weights.block_rows)
        shapes = {
            "tensor": [(1,), (), (1, 1)],
            "output": [(matrix.outputs, 1), (matrix.outputs,)],
            "group": [(matrix.outputs, matrix.num_groups)],
            "block": [(blocks, matrix.num_groups)],
        }[weights.scale]
        scales = matrix.scales(kind, matrix.which(kind, shapes))
        if weights.scale in ("group", "block"):
            return scales
        return scales.view(-1, 1).expand(matrix.outputs, 1)

    def _zeros(self, matrix: _Matrix, bits: int) -> Tensor:
        """The unsigned codes that stand for 0, for each output and group; files have them signed, in words or one a byte."""
        kind = "weight_zero_point"
        packed = (_num_words(matrix.outputs, bits), matrix.num_groups)
        shapes = [(matrix.outputs, matrix.num_groups), packed]
        shape = matrix.which(kind, shapes)
        found = matrix.read(kind, shape, (torch.int8, torch.int32))
        if found.dtype == torch.int32:
            if shape != packed:
                raise UnsupportedModel(f"the tensor {matrix.name}.{kind} has the shape {list(shape)}, not {list(packed)}")
            return unpack(found.T, bits, matrix.outputs).T
        return found.view(torch.uint8) + 2 ** (bits - 1)


def _unquantised(reader: WeightReader, part: Part, kind: str) -> None:
    """A module that is not quantised, or else an error: it has neither weights nor codes."""
    if part.name not in reader:
        name = part.name.removesuffix(".weight")
        raise UnsupportedModel(f"the weights lack the tensor {name}.{kind}, and {part.name} too; the files may be incomplete")


def _num_words(count: int, bits: int) -> int:
    return -(-count * bits // _WORD)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
