"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of pixels to embeddings in the decoder's space.

One body, since they differ by flags: a patch embedding, blocks of attention within a step in time (or a window of one) and
an MLP, and a merger that makes a token of each square of patches. Images of several requests are one batch. Every block ends in
the residual sum that the next one's norm begins with, so the two are one op; the stream is float32 whatever the layers compute
in. Knows nothing of prompts. Tensor-parallel ranks hold a whole tower each.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer.models.linears import load_linear
from dashinfer.models.vision_config import Grid, VisionConfig
from dashinfer.models.vision_layout import Layout
from dashinfer.models.vision_pixels import PixelTable
from dashinfer.models.vision_shapes import PATCHES, POSITIONS, TowerNames, tower_shapes
from dashinfer.models.weights import Part, WeightReader
from dashinfer.types import VisionEngine
from dashinfer_kernels import (
    Linear,
    add_layer_norm,
    add_rms_norm,
    gelu_mul,
    layer_norm,
    pack_linear,
    rms_norm,
    rotate_heads,
    silu_mul,
    varlen_attention,
)

_EPS = 1e-6


@dataclass(frozen=True)
class VisionOutput:
    """Of all images and videos of a batch, one after the other.

    Attributes:
        embeddings: [tokens, hidden of the decoder], what takes the place of placeholder tokens.
        deepstack: [tokens, hidden of the decoder] each, what is added after each of the decoder's first layers.
    """

    embeddings: Tensor
    deepstack: tuple[Tensor, ...]


class VisionTower:
    """A vision tower, loaded.

    Attributes:
        weight_bytes: that it holds.
    """

    engine: VisionEngine = "native"

    def __init__(self, config: VisionConfig, reader: WeightReader, pixel_values: Tensor) -> None:
        """Reads the tensors of `tower_shapes`.

        Args:
            pixel_values: [channels, 256] float32, what each byte of each channel becomes by rescaling and normalisation.

        Raises:
            UnsupportedModel: a tensor is missing, has an unexpected shape or type, or is one too many.
        """
        assert pixel_values.shape == (config.channels, 256)
        self.config = config
        self._dtype, self._device = reader.dtype, reader.device
        load = _Loader(config, reader)
        patches = load.tensor(f"{PATCHES}.weight", reader.dtype).flatten(1)
        self._patches = pack_linear(patches, load.tensor(f"{PATCHES}.bias", reader.dtype) if config.patch_bias else None)
        self._positions = None if config.positions_side is None else load.tensor(POSITIONS)
        self._blocks = [_Block(load, index) for index in range(config.depth)]
        self._merger = _Merger(load, "visual.merger.")
        self._deepstack = {
            block: _Merger(load, f"visual.deepstack_merger_list.{level}.")
            for level, block in enumerate(config.deepstack_blocks)
        }
        reader.finish(config.depth)
        self.weight_bytes = load.nbytes

        self._pixels = PixelTable(pixel_values, reader.device, reader.dtype)
        axis = config.head_dim // 2
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, axis, 2, dtype=torch.float32) / axis)
        self._frequencies = frequencies.to(reader.device)

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> VisionOutput:
        """All of `steps` at once."""
        steps = self.steps(patches, grids)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    @torch.inference_mode()
    def steps(self, patches: Tensor, grids: Sequence[Grid]) -> Generator[None, None, VisionOutput]:
        """Yields after each block, so that the caller can run something else in between; returns the embeddings.

        Args:
            patches: [patches, patch_dim] uint8 on any device: of each image or video step by step, in a step by squares of
                merge_size * merge_size patches.
            grids: steps, rows and columns of patches of each image or video; at least one.
        """
        config = self.config
        layout = Layout.build(grids, config.merge_size, config.window)
        assert patches.shape == (len(layout.rows), config.patch_dim) and patches.dtype == torch.uint8
        order = None if layout.order is None else self._upload(layout.order)
        patches = patches.to(self._device, non_blocking=True)
        if order is not None:
            patches = patches.unflatten(0, (len(order), -1))[order].flatten(0, 1)
        residual = self._embed(patches, layout)
        angles = self._angles(layout)
        wholes = _Bounds.of(layout.steps, self._device)
        windows = wholes if layout.windows is None else _Bounds.of(layout.windows, self._device)

        deepstack = []
        normed = self._blocks[0].norm(residual, self._dtype)
        norms_after = [*(block.norm for block in self._blocks[1:]), self._merger.norm]
        for index, (block, norm_after) in enumerate(zip(self._blocks, norms_after, strict=True)):
            whole = config.window is None or index in config.full_attention_blocks
            normed = block(normed, residual, angles, wholes if whole else windows, norm_after)
            if index in self._deepstack:
                deepstack.append(self._deepstack[index](residual, self._dtype))
            yield
        merged = [self._merger.project(normed), *deepstack]
        if order is not None:
            merged = [torch.empty_like(each).index_copy_(0, order, each) for each in merged]
        return VisionOutput(merged[0], tuple(merged[1:]))

    def _upload(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cuda":  # a copy from other memory would wait for whatever the device does
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _embed(self, patches: Tensor, layout: Layout) -> Tensor:
        """[patches, hidden] float32."""
        residual = self._patches.wide(self._pixels(patches))
        if self._positions is not None and self.config.positions_side is not None:
            indices, shares = layout.position_weights(self.config.positions_side)
            residual += F.embedding_bag(
                self._upload(indices), self._positions, per_sample_weights=self._upload(shares), mode="sum"
            )
        return residual

    def _angles(self, layout: Layout) -> Tensor:
        """[patches, head_dim] float32, cosines and then sines: half of the angles by the row, half by the column."""
        turns = [self._upload(places).float()[:, None] * self._frequencies for places in (layout.rows, layout.columns)]
        angles = torch.cat(turns, 1)
        return torch.cat((angles.cos(), angles.sin()), 1)


@dataclass(frozen=True)
class _Bounds:
    """Where sequences of patches end, and the patches of the longest."""

    cumulative: Tensor  # [sequences + 1] int32
    longest: int

    @classmethod
    def of(cls, bounds: Any, device: torch.device) -> "_Bounds":
        return cls(torch.from_numpy(bounds).to(device, non_blocking=True), int((bounds[1:] - bounds[:-1]).max()))


class _Loader:
    """Reads what a tower is made of, and counts its bytes."""

    def __init__(self, config: VisionConfig, reader: WeightReader) -> None:
        self.config = config
        self.names = TowerNames.of(config)
        self.nbytes = 0
        self._reader = reader
        self._shapes = tower_shapes(config)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = self._reader.read(Part(name, self._shapes[name]), dtype=dtype)
        self.nbytes += tensor.nbytes
        return tensor

    def linear(self, *names: str) -> Linear:
        """Layers with a bias, as one."""
        parts = [Part(f"{name}.weight", self._shapes[f"{name}.weight"]) for name in names]
        linear = load_linear(self._reader, parts, bias=True)
        self.nbytes += linear.nbytes
        return linear

    def norm(self, name: str) -> "_Norm":
        weight = self.tensor(f"{name}.weight")
        return _Norm(weight, None if self.config.gated else self.tensor(f"{name}.bias"))


class _Norm:
    """A layer norm, or without a bias an RMS norm."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, size] float32 -> [rows, size] `dtype`."""
        if self._bias is None:
            return rms_norm(x, self._weight, _EPS, dtype)
        return layer_norm(x, self._weight, self._bias, _EPS, dtype)

    def after_adding(self, x: Tensor, residual: Tensor) -> Tensor:
        """Of `residual` [rows, size] float32, to which `x` is added in place, in the type of `x`."""
        if self._bias is None:
            return add_rms_norm(x, residual, self._weight, _EPS)
        return add_layer_norm(x, residual, self._weight, self._bias, _EPS)


class _Block:
    """Attention and an MLP, each after a norm and with a residual connection around it."""

    def __init__(self, load: _Loader, index: int) -> None:
        config, prefix = load.config, f"visual.blocks.{index}."
        self.norm = load.norm(f"{prefix}norm1")
        self._qkv = load.linear(f"{prefix}attn.qkv")
        self._output = load.linear(f"{prefix}attn.proj")
        self._mlp_norm = load.norm(f"{prefix}norm2")
        *up, down = (f"{prefix}mlp.{name}" for name in load.names.mlp)
        self._up = load.linear(*up)
        self._down = load.linear(down)
        self._activate = (_GATED if config.gated else _ACTIVATIONS)[config.activation]
        self._num_heads, self._head_dim = config.num_heads, config.head_dim

    def __call__(self, normed: Tensor, residual: Tensor, angles: Tensor, bounds: _Bounds, norm_after: _Norm) -> Tensor:
        """`norm_after` of the block's output.

        Args:
            normed: [patches, hidden], the input after `norm`.
            residual: [patches, hidden] float32, the input before it; the output afterwards.
        """
        heads = self._qkv(normed).view(len(normed), -1, self._head_dim)
        rotate_heads(heads[:, : 2 * self._num_heads], angles)
        q, k, v = heads.chunk(3, 1)
        attended = varlen_attention(q, k, v, bounds.cumulative, bounds.longest, scale=self._head_dim**-0.5)
        normed = self._mlp_norm.after_adding(self._output(attended), residual)
        return norm_after.after_adding(self._down(self._activate(self._up(normed))), residual)


class _Merger:
    """Squares of patches to tokens: a norm and an MLP. The last merger's norm is over patches, others' over whole squares."""

    def __init__(self, load: _Loader, prefix: str) -> None:
        self.norm = load.norm(f"{prefix}{load.names.merger_norm}")
        self._up, self._down = (load.linear(f"{prefix}{name}") for name in load.names.merger_mlp)

    def __call__(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        """[patches, hidden] float32 -> [tokens, hidden of the decoder]."""
        return self.project(self.norm(residual.view(-1, self._up.in_features), dtype))

    def project(self, normed: Tensor) -> Tensor:
        """[patches, hidden], or whole squares, after the norm."""
        return self._down(F.gelu(self._up(normed.view(-1, self._up.in_features))))


def _quick_gelu(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`, in place."""
    return F.silu(x.mul_(1.702), inplace=True).div_(1.702)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu_mul, "gelu_tanh": gelu_mul}
