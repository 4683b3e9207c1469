"""The forward pass of training: Qwen2-VL with pictures of one grid in a batch, so that nothing is masked.

The parameters are those of transformers' class, by name; what it computes is the same, on CPU several times as fast.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dashinfer.types import Grid

Weights = Mapping[str, Tensor]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[batch, heads, length, head_dim] each; CPU's fused kernel is slower at these lengths."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _vision_block(x: Tensor, cos: Tensor, sin: Tensor, heads: int, w: Sequence[Tensor]) -> Tensor:
    count, patches, width = x.shape
    h = F.layer_norm(x, (width,), w[0], w[1], 1e-6)
    q, k, v = F.linear(h, w[2], w[3]).view(count, patches, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
    h = _attention(_turned(q, cos, sin), _turned(k, cos, sin), v, None).transpose(1, 2).reshape(count, patches, width)
    x = x + F.linear(h, w[4], w[5])
    h = F.linear(F.layer_norm(x, (width,), w[6], w[7], 1e-6), w[8], w[9])
    return x + F.linear(h * torch.sigmoid(1.702 * h), w[10], w[11])


_VISION_BLOCK = [
    f"{name}.{part}"
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for part in ("weight", "bias")
]


def _decoder_layer(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, dim: int, w: Sequence[Tensor]) -> Tensor:
    rows, length, width = x.shape
    h = _rms_norm(x, w[0])
    q, k, v = (F.linear(h, w[at], w[at + 1]).view(rows, length, -1, dim).transpose(1, 2) for at in (1, 3, 5))
    q, k = _turned(q, cos, sin), _turned(k, cos, sin)
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
    h = _attention(q, k, v, mask).transpose(1, 2).reshape(rows, length, width)
    x = x + F.linear(h, w[7])
    h = _rms_norm(x, w[8])
    return x + F.linear(F.silu(F.linear(h, w[9])) * F.linear(h, w[10]), w[11])


_DECODER_LAYER = [
    "input_layernorm.weight",
    *(f"self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")),
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]


class Network:
    """The forward pass for a configuration; weights are given with each call.

    With `fused`, blocks are compiled by torch, which takes a minute at first and needs a C++ compiler.
    """

    def __init__(self, config: Mapping[str, Any], *, fused: bool) -> None:
        self._config = config
        self._vision_block = torch.compile(_vision_block, dynamic=True) if fused else _vision_block
        self._decoder_layer = torch.compile(_decoder_layer, dynamic=True) if fused else _decoder_layer

    def tower(self, w: Weights, pixels: Tensor, grid: Grid) -> Tensor:
        """[count, patches, patch_dim], all of `grid`, to [count, tokens, hidden]."""
        p, config = "model.visual.", self._config["vision_config"]
        x = F.linear(pixels, w[p + "patch_embed.proj.weight"].flatten(1))
        count, patches, width = x.shape
        heads = config["num_heads"]
        dim = width // heads
        rows, columns = torch.meshgrid(torch.arange(grid[1]), torch.arange(grid[2]), indexing="ij")
        places = [
            each.reshape(grid[1] // 2, 2, grid[2] // 2, 2).transpose(1, 2).reshape(-1, 1).float() for each in (rows, columns)
        ]
        frequencies = 10000.0 ** -(torch.arange(0, dim // 2, 2).float() / (dim // 2))
        angles = torch.cat([place * frequencies for place in places] * 2, -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in range(config["depth"]):
            x = self._vision_block(x, cos, sin, heads, [w[f"{p}blocks.{layer}.{name}"] for name in _VISION_BLOCK])
        m = p + "merger."
        h = F.layer_norm(x, (width,), w[m + "ln_q.weight"], w[m + "ln_q.bias"], 1e-6).reshape(count, patches // 4, 4 * width)
        h = F.gelu(F.linear(h, w[m + "mlp.0.weight"], w[m + "mlp.0.bias"]))
        return F.linear(h, w[m + "mlp.2.weight"], w[m + "mlp.2.bias"])

    def decoder(
        self, w: Weights, tokens: Tensor, branches: Tensor, positions: Tensor, holders: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """To [rows, length, hidden], and those of the tokens of pictures half way.

        `seen` is [tokens of all pictures, hidden], the others as a `Batch` has them.
        """
        p, config = "model.language_model.", self._config
        x = F.embedding(tokens, w[p + "embed_tokens.weight"])
        length, width = x.shape[1:]
        x = x.view(-1, width).index_copy(0, holders, seen).view(x.shape)
        dim = width // config["num_attention_heads"]
        frequencies = config["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
        axes = torch.repeat_interleave(torch.arange(3), torch.tensor(config["rope_scaling"]["mrope_section"]))
        angles = positions[axes].permute(1, 2, 0).float() * frequencies  # [rows, length, dim / 2]
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        elsewhere = (branches[:, None] != branches[:, :, None]) & (branches[:, None] != 0)
        mask = torch.zeros(elsewhere.shape, dtype=x.dtype).masked_fill_(later | elsewhere, float("-inf"))[:, None]
        for layer in range(config["num_hidden_layers"]):
            if 2 * layer == config["num_hidden_layers"]:
                middle = x.reshape(-1, width)[holders]
            x = self._decoder_layer(x, cos, sin, mask, dim, [w[f"{p}layers.{layer}.{name}"] for name in _DECODER_LAYER])
        return _rms_norm(x, w[p + "norm.weight"]), middle
