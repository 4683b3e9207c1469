"""Quantised matrices as checkpoints keep them: GPTQ's and AWQ's words, and integers or float8 numbers with scales.

Which tensors a module has says whether it is quantised; the config only says how. A share of a matrix is read, not the whole of
it; one that cuts a group of inputs, a block or a word is refused. Layouts of devices are made elsewhere, from the
`QuantizedWeight`s that come from here.
"""

import torch
from torch import Tensor

from dashinfer.errors import UnsupportedModel
from dashinfer.models.linears import WeightFormat
from dashinfer.models.matrix_share import FLOATS, MatrixShare, num_words
from dashinfer.models.quantized_config import AWQConfig, CheckpointQuantization, GPTQConfig, GPTQSettings
from dashinfer.models.scaled_config import ScaledConfig, ScaledWeights
from dashinfer.models.unpack import unpack, unpack_awq, unpack_zeros
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import QuantizedWeight
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quant_matmul.weight import FLOAT8


def checkpoint_format(quantization: CheckpointQuantization) -> WeightFormat:
    """The reader of a checkpoint's matrices."""
    if isinstance(quantization, GPTQConfig):
        return GPTQFormat(quantization)
    if isinstance(quantization, AWQConfig):
        return AWQFormat(quantization)
    return ScaledFormat(quantization)


class _CheckpointFormat(WeightFormat):
    def read_head(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        return self.read(reader, part)


class GPTQFormat(_CheckpointFormat):
    """`qweight` [inputs / 32 * bits, outputs], `qzeros` [groups, outputs / 32 * bits], `scales` [groups, outputs], `g_idx`."""

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
        matrix = MatrixShare(reader, part, settings.group_size)
        order = matrix.order("g_idx")
        words = matrix.words(matrix.columns, matrix.inputs, bits, "inputs")
        shape = (num_words(matrix.inputs, bits), matrix.outputs)
        packed = matrix.read("qweight", shape, (torch.int32,), words, part.rows)
        codes = unpack(packed.T, bits, matrix.width)
        zeros = self._zeros(matrix, settings)
        scales = matrix.scales("scales", (matrix.num_groups, matrix.outputs)).T
        if order is not None:
            codes = codes[:, order]
        return matrix.integers(codes, zeros, scales, bits, order)

    def steps(self, reader: WeightReader, part: Part) -> tuple[int, int]:
        name = part.name.removesuffix(".weight")
        settings = self._config.of(name)
        if f"{name}.qweight" not in reader or settings is None:
            return 1, 1
        matrix = MatrixShare(reader, part, settings.group_size)
        return 1, matrix.input_step(settings.bits) if matrix.order("g_idx") is None else matrix.inputs

    def _zeros(self, matrix: MatrixShare, settings: GPTQSettings) -> Tensor | None:
        """The codes that stand for 0, for each output and group; None: the middle one.

        Of symmetric layers it is, whatever the file has: in some of version 1 the zero points are as in version 2.
        """
        if settings.symmetric:
            matrix.skip("qzeros")
            return None
        config, bits = self._config, settings.bits
        words = matrix.read("qzeros", (matrix.num_groups, num_words(matrix.outputs, bits)), (torch.int32,))
        ones = config.settings.bits if config.zeros_less_one else None
        zeros = unpack_zeros(words, bits, matrix.outputs, ones=ones, misplaced=config.zeros_misplaced).T
        return None if (zeros == 2 ** (bits - 1)).all() else zeros


class AWQFormat(_CheckpointFormat):
    """`qweight` [inputs, outputs / 8], `qzeros` [groups, outputs / 8], `scales` [groups, outputs]."""

    def __init__(self, config: AWQConfig) -> None:
        self._config = config

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        matrix = MatrixShare(reader, part, self._config.group_size)
        if not matrix.has("qweight"):
            return _unquantised(reader, part, "qweight")
        words = matrix.words(matrix.rows, matrix.outputs, 4, "outputs")
        shape = (matrix.inputs, num_words(matrix.outputs, 4))
        packed = matrix.read("qweight", shape, (torch.int32,), part.columns, words)
        codes = unpack_awq(packed)[: matrix.rows[1] - matrix.rows[0]]
        shape = (matrix.num_groups, num_words(matrix.outputs, 4))
        zeros = unpack_awq(matrix.read("qzeros", shape, (torch.int32,)))[: matrix.outputs]
        scales = matrix.scales("scales", (matrix.num_groups, matrix.outputs)).T
        return matrix.integers(codes, zeros, scales, 4)

    def steps(self, reader: WeightReader, part: Part) -> tuple[int, int]:
        matrix = MatrixShare(reader, part, self._config.group_size)
        return (8, matrix.input_step(None)) if matrix.has("qweight") else (1, 1)


class ScaledFormat(_CheckpointFormat):
    """`weight` of 8 bits, or `weight_packed` [outputs, inputs / 32 * bits], with `weight_scale` or `weight_scale_inv` (which is
    the same) and perhaps `weight_zero_point`."""

    def __init__(self, config: ScaledConfig) -> None:
        self.activations: Activations | None = config.activations
        self._config = config

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        name = part.name.removesuffix(".weight")
        packed = f"{name}.weight_packed" in reader
        if not packed:
            if part.name not in reader:
                return _unquantised(reader, part, "weight_packed")
            if reader.stored_type(part.name) in FLOATS:
                return None
        weights = self._config.of(name)
        if weights is None:
            kind = "weight_packed" if packed else "weight"
            raise UnsupportedModel(f"the tensor {name}.{kind} is quantised, but config.json says that {name} is not")
        matrix = MatrixShare(reader, part, weights.group_size)
        matrix.skip("input_scale", "input_zero_point", "output_scale", "activation_scale")
        if packed:
            return self._packed(matrix, part, weights)
        return self._plain(matrix, part, weights)

    def steps(self, reader: WeightReader, part: Part) -> tuple[int, int]:
        name = part.name.removesuffix(".weight")
        weights = self._config.of(name)
        packed = f"{name}.weight_packed" in reader
        if weights is None or not (packed or (part.name in reader and reader.stored_type(part.name) not in FLOATS)):
            return 1, 1
        matrix = MatrixShare(reader, part, weights.group_size)
        if packed and matrix.order("weight_g_idx") is not None:
            return 1, matrix.inputs
        return weights.block_rows, matrix.input_step(weights.bits if packed else None)

    def _packed(self, matrix: MatrixShare, part: Part, weights: ScaledWeights) -> QuantizedWeight:
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
        stored = (matrix.outputs, num_words(matrix.inputs, bits))
        codes = unpack(matrix.read("weight_packed", stored, (torch.int32,), part.rows, words), bits, matrix.width)
        if order is not None:
            codes = codes[:, order]
        zeros = None
        if not weights.symmetric:
            zeros = self._zeros(matrix, bits)
        else:
            matrix.skip("weight_zero_point")
        return matrix.integers(codes, zeros, self._scales(matrix, weights), bits, order)

    def _plain(self, matrix: MatrixShare, part: Part, weights: ScaledWeights) -> QuantizedWeight:
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

    def _blocks(self, matrix: MatrixShare, codes: Tensor, scales: Tensor, block_rows: int) -> QuantizedWeight:
        matrix.require(matrix.rows, matrix.outputs, block_rows, "outputs", f"blocks of {block_rows}")
        columns = slice(matrix.columns[0] // matrix.group_size, -(-matrix.columns[1] // matrix.group_size))
        scales = scales[matrix.rows[0] // block_rows : -(-matrix.rows[1] // block_rows), columns].contiguous()
        return QuantizedWeight(codes=codes, scales=scales, group_size=matrix.group_size, block_rows=block_rows)

    def _scales(self, matrix: MatrixShare, weights: ScaledWeights) -> Tensor:
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

    def _zeros(self, matrix: MatrixShare, bits: int) -> Tensor:
        """The unsigned codes that stand for 0, for each output and group; files have them signed, in words or one a byte."""
        kind = "weight_zero_point"
        packed = (num_words(matrix.outputs, bits), matrix.num_groups)
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
