"""A vision tower as an ONNX graph, made from its config alone, and the file of weights beside it.

Nothing is traced: the graph is written node by node, so that it depends on no release of torch. Whatever the grid of patches
decides comes from outside, and the graph has dynamic lengths only. The residual stream, norms, rotations and activations are
float32, matrices and attention the weights' type.

Inputs, where `dtype` is the weights' type:
    patches: [patches, patch_dim] dtype, pixel values.
    cos, sin: [patches, head_dim / 2] float32, of the angles that queries and keys are turned by.
    positions: [patches, hidden] float32, embeddings of places; in towers that have them.
    steps, steps_mask, steps_back: `vision_batches.Padded`, the mask in dtype.
    windows, windows_mask, windows_back: the same of windows; in towers that have them.
Outputs, [tokens, hidden of the decoder] dtype each: embeddings, and deepstack_0, deepstack_1 ...
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dashinfer.models.vision_config import VisionActivation, VisionConfig
from dashinfer.models.vision_shapes import PATCHES, TowerNames, tower_shapes

WEIGHTS_FILE = "weights.bin"
_OPSET, _IR_VERSION = 18, 9
_EPS = 1e-6
_ALIGNMENT = 64  # bytes
_TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}

ReadTensor = Callable[[str, torch.dtype], Tensor]


@dataclass(frozen=True)
class Slot:
    """A tensor's place in the file of weights."""

    name: str
    dtype: torch.dtype
    offset: int  # bytes


@dataclass(frozen=True)
class TowerGraph:
    """Attributes:
    model: refers to the tensors of `slots` in `WEIGHTS_FILE` beside it.
    slots: by offset; `nbytes` is the file's size.
    """

    model: onnx.ModelProto
    slots: tuple[Slot, ...]
    nbytes: int

    def tensors(self, read: ReadTensor) -> Iterator[tuple[Slot, memoryview]]:
        """Each tensor's bytes, read in the order of the file."""
        for slot in self.slots:
            yield slot, memoryview(read(slot.name, slot.dtype).contiguous().view(torch.uint8).flatten().numpy())

    def save(self, path: Path, read: ReadTensor) -> None:
        """Writes `path`, and `WEIGHTS_FILE` beside it."""
        with open(path.parent / WEIGHTS_FILE, "wb") as file:
            for slot, data in self.tensors(read):
                file.seek(slot.offset)
                file.write(data)
        path.write_bytes(self.model.SerializeToString())


def tower_graph(config: VisionConfig, dtype: torch.dtype) -> TowerGraph:
    """The graph of a tower whose weights are of `dtype`: float32, float16 or bfloat16."""
    return _Tower(config, dtype).build()


class _Graph:
    """Nodes, constants and weights as they are added. Values are named by their producer."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.slots: list[Slot] = []
        self.nbytes = 0
        self._shapes = shapes
        self._constants: dict[tuple[Any, ...], str] = {}

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name of what the node gives; a list of them where it gives several."""
        names = [f"{op}_{len(self.nodes)}" + (f"_{index}" if outputs > 1 else "") for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=names[0], **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, values: float | list[int]) -> str:
        """A float32, or a list of int64."""
        key = (type(values), tuple(values) if isinstance(values, list) else values)
        if key not in self._constants:
            name = self._constants[key] = f"constant_{len(self._constants)}"
            array = np.array(values, np.int64 if isinstance(values, list) else np.float32)
            self.initializers.append(numpy_helper.from_array(array, name))
        return self._constants[key]

    def weight(self, name: str, dtype: torch.dtype, *, flat: bool = False) -> str:
        """A tensor of the checkpoint; `flat`: all but its first dimension as one."""
        shape = self._shapes[name]
        dims = (shape[0], math.prod(shape[1:])) if flat else shape
        size = math.prod(shape) * dtype.itemsize
        tensor = TensorProto(name=name, data_type=_TYPES[dtype], dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", self.nbytes), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.slots.append(Slot(name, dtype, self.nbytes))
        self.nbytes += size + -size % _ALIGNMENT
        return name


class _Tower:
    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._names = TowerNames.of(config)
        self._graph = _Graph(tower_shapes(config))

    def build(self) -> TowerGraph:
        config, graph, add = self._config, self._graph, self._graph.add
        residual = self._wide(self._linear("patches", PATCHES, bias=config.patch_bias, flat=True))
        if config.positions_side is not None:
            residual = add("Add", residual, "positions")
        # [patches, 1, head_dim / 2]: the same for all heads
        angles = [add("Unsqueeze", name, graph.constant([1])) for name in ("cos", "sin")]

        outputs = {}
        for index in range(config.depth):
            whole = config.window is None or index in config.full_attention_blocks
            residual = self._block(f"visual.blocks.{index}.", residual, angles, "steps" if whole else "windows")
            if index in config.deepstack_blocks:
                level = config.deepstack_blocks.index(index)
                prefix = f"visual.deepstack_merger_list.{level}."
                outputs[f"deepstack_{level}"] = self._merger(prefix, self._squares(residual))
        outputs = {"embeddings": self._merger("visual.merger.", residual)} | outputs
        for name, value in outputs.items():
            graph.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        model = helper.make_model(
            helper.make_graph(
                graph.nodes,
                "tower",
                self._inputs(),
                [self._value(name, self._dtype, "tokens", config.out_hidden_size) for name in outputs],
                graph.initializers,
            ),
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="dashinfer",
        )
        return TowerGraph(model, tuple(graph.slots), graph.nbytes)

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        config, wide = self._config, torch.float32
        inputs = [self._value("patches", self._dtype, "patches", config.patch_dim)]
        inputs += [self._value(name, wide, "patches", config.head_dim // 2) for name in ("cos", "sin")]
        if config.positions_side is not None:
            inputs.append(self._value("positions", wide, "patches", config.hidden_size))
        rows: dict[str, tuple[str, str | int]] = {"steps": ("sequences", "longest")}
        if config.window is not None:
            rows["windows"] = ("windows", (config.window * config.merge_size) ** 2)
        for name, (sequences, longest) in rows.items():
            inputs.append(self._value(name, None, sequences, longest))
            inputs.append(self._value(f"{name}_mask", self._dtype, sequences, 1, 1, longest))
            inputs.append(self._value(f"{name}_back", None, "patches"))
        return inputs

    def _value(self, name: str, dtype: torch.dtype | None, *shape: str | int) -> onnx.ValueInfoProto:
        """`dtype` None: int32."""
        return helper.make_tensor_value_info(name, TensorProto.INT32 if dtype is None else _TYPES[dtype], shape)

    def _wide(self, x: str) -> str:
        return x if self._dtype == torch.float32 else self._graph.add("Cast", x, to=TensorProto.FLOAT)

    def _narrow(self, x: str) -> str:
        return x if self._dtype == torch.float32 else self._graph.add("Cast", x, to=_TYPES[self._dtype])

    def _linear(self, x: str, name: str, *, bias: bool = True, flat: bool = False) -> str:
        weights = [self._graph.weight(f"{name}.weight", self._dtype, flat=flat)]
        if bias:
            weights.append(self._graph.weight(f"{name}.bias", self._dtype))
        return self._graph.add("Gemm", x, *weights, transB=1)

    def _norm(self, x: str, name: str) -> str:
        """Of float32, in the weights' type."""
        add, constant = self._graph.add, self._graph.constant
        weight = self._graph.weight(f"{name}.weight", torch.float32)
        if not self._config.gated:
            bias = self._graph.weight(f"{name}.bias", torch.float32)
            return self._narrow(add("LayerNormalization", x, weight, bias, axis=-1, epsilon=_EPS))
        mean = add("ReduceMean", add("Mul", x, x), constant([-1]), keepdims=1)
        root = add("Sqrt", add("Add", mean, constant(_EPS)))
        return self._narrow(add("Mul", add("Div", x, root), weight))

    def _block(self, prefix: str, residual: str, angles: list[str], rows: str) -> str:
        add = self._graph.add
        attended = self._attention(prefix, self._norm(residual, f"{prefix}norm1"), angles, rows)
        residual = add("Add", residual, self._wide(attended))
        x = self._norm(residual, f"{prefix}norm2")
        *ups, down = (f"{prefix}mlp.{name}" for name in self._names.mlp)
        first = self._activate(self._wide(self._linear(x, ups[0])), self._config.activation)
        if self._config.gated:
            first = add("Mul", first, self._wide(self._linear(x, ups[1])))
        return add("Add", residual, self._wide(self._linear(self._narrow(first), down)))

    def _attention(self, prefix: str, x: str, angles: list[str], rows: str) -> str:
        """[patches, hidden] to the same, each patch with those of its sequence."""
        config, add, constant = self._config, self._graph.add, self._graph.constant
        heads, size = config.num_heads, config.head_dim
        qkv = add("Reshape", self._linear(x, f"{prefix}attn.qkv"), constant([-1, 3 * heads, size]))
        turned, v = add("Split", qkv, constant([2 * heads, heads]), outputs=2, axis=1)
        q, k = add("Split", self._turn(self._wide(turned), angles), constant([heads, heads]), outputs=2, axis=1)
        q = add("Mul", q, constant(size**-0.5))
        # [sequences, longest, heads, head_dim]
        q, k, v = (add("Gather", each, rows, axis=0) for each in (self._narrow(q), self._narrow(k), v))
        q, v = (add("Transpose", each, perm=[0, 2, 1, 3]) for each in (q, v))
        scores = add("MatMul", q, add("Transpose", k, perm=[0, 2, 3, 1]))
        shares = add("Softmax", add("Add", scores, f"{rows}_mask"), axis=-1)
        attended = add("Transpose", add("MatMul", shares, v), perm=[0, 2, 1, 3])
        attended = add("Reshape", attended, constant([-1, config.hidden_size]))
        return self._linear(add("Gather", attended, f"{rows}_back", axis=0), f"{prefix}attn.proj")

    def _turn(self, x: str, angles: list[str]) -> str:
        """Of [patches, heads, head_dim] float32, values of the first half with those of the second."""
        add, (cos, sin) = self._graph.add, angles
        half = self._config.head_dim // 2
        a, b = add("Split", x, self._graph.constant([half, half]), outputs=2, axis=2)
        first = add("Sub", add("Mul", a, cos), add("Mul", b, sin))
        second = add("Add", add("Mul", b, cos), add("Mul", a, sin))
        return add("Concat", first, second, axis=2)

    def _activate(self, x: str, kind: VisionActivation) -> str:
        """Of float32."""
        add, constant = self._graph.add, self._graph.constant
        if kind == "silu":
            return add("Mul", x, add("Sigmoid", x))
        if kind == "quick_gelu":
            return add("Mul", x, add("Sigmoid", add("Mul", x, constant(1.702))))
        if kind == "gelu":
            share = add("Erf", add("Mul", x, constant(0.5**0.5)))
        else:
            cube = add("Mul", add("Mul", x, x), add("Mul", x, constant(0.044715)))
            share = add("Tanh", add("Mul", add("Add", x, cube), constant((2 / math.pi) ** 0.5)))
        return add("Mul", add("Mul", x, constant(0.5)), add("Add", share, constant(1.0)))

    def _squares(self, x: str) -> str:
        merged = self._config.hidden_size * self._config.merge_size**2
        return self._graph.add("Reshape", x, self._graph.constant([-1, merged]))

    def _merger(self, prefix: str, residual: str) -> str:
        """Of patches or, normed as such, whole squares, to tokens."""
        x = self._squares(self._norm(residual, f"{prefix}{self._names.merger_norm}"))
        up, down = (f"{prefix}{name}" for name in self._names.merger_mlp)
        return self._linear(self._narrow(self._activate(self._wide(self._linear(x, up)), "gelu")), down)
