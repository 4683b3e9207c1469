"""A vision tower's shape, read from a Hugging Face config of Qwen2-VL, Qwen2.5-VL or Qwen3-VL.

Knows no torch, so that the parent lays out prompts from it. A key that a file leaves out has the value that transformers gives
it for that family.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dashinfer.errors import UnsupportedModel
from dashinfer.models.config import read_count
from dashinfer.types import Grid

VisionActivation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
_ACTIVATIONS: dict[str, VisionActivation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Where the families differ; sizes are those of a config that says nothing."""

    depth: int
    hidden_key: str  # what the config calls the size of the tower's stream
    hidden_size: int
    out_key: str  # and the size of the decoder's
    act: str
    patch_size: int
    intermediate_size: int | None = None  # None: mlp_ratio * hidden_size
    gated: bool = False  # an MLP of gate, up and down; RMS norms with it, as in a decoder
    patch_bias: bool = False
    window_size: int | None = None  # pixels
    full_attention_blocks: tuple[int, ...] = ()
    num_positions: int | None = None
    deepstack_blocks: tuple[int, ...] = ()
    tokens_per_second: int | None = None
    steps_apart: bool = False


_FAMILIES = {
    "Qwen2VLForConditionalGeneration": _Family(
        depth=32, hidden_key="embed_dim", hidden_size=1280, out_key="hidden_size", act="quick_gelu", patch_size=14
    ),
    "Qwen2_5_VLForConditionalGeneration": _Family(
        depth=32,
        hidden_key="hidden_size",
        hidden_size=3584,
        out_key="out_hidden_size",
        act="silu",
        patch_size=14,
        intermediate_size=3420,
        gated=True,
        window_size=112,
        full_attention_blocks=(7, 15, 23, 31),
        tokens_per_second=4,
    ),
    "Qwen3VLForConditionalGeneration": _Family(
        depth=27,
        hidden_key="hidden_size",
        hidden_size=1152,
        out_key="out_hidden_size",
        act="gelu_pytorch_tanh",
        patch_size=16,
        intermediate_size=4304,
        patch_bias=True,
        num_positions=2304,
        deepstack_blocks=(8, 16, 24),
        steps_apart=True,
    ),
}
_BY_MODEL_TYPE = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A vision tower's shape, and the tokens that stand for what it sees."""

    architecture: str
    depth: int  # blocks
    hidden_size: int
    intermediate_size: int
    num_heads: int
    activation: VisionActivation
    gated: bool  # an MLP of gate, up and down, and RMS norms; else of two layers, and layer norms
    channels: int
    patch_size: int  # pixels, of a side
    temporal_patch_size: int  # frames that a patch holds
    patch_bias: bool
    merge_size: int  # patches of a side that become one token
    out_hidden_size: int  # the decoder's
    window: int | None  # tokens of a side of a window; None: attention is to a whole step
    full_attention_blocks: tuple[int, ...]  # with windows: the blocks without
    positions_side: int | None  # of the square of learned position embeddings; None: there are none
    deepstack_blocks: tuple[int, ...]  # whose outputs go to the decoder's first layers, ascending
    rope_theta: float
    tokens_per_second: float | None  # temporal positions of a second of video; None: one for each step
    steps_apart: bool  # a video is given step by step, with text between them
    image_token: int
    video_token: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Bytes of a patch: channels * temporal_patch_size * patch_size * patch_size, in this order."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    def num_tokens(self, grid: Grid) -> int:
        """Of an image or a video."""
        return math.prod(grid) // self.merge_size**2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """From the contents of a vision-language model's config.json.

        Raises:
            UnsupportedModel: an architecture or setting that cannot be served, or a value that makes no sense.
        """
        names = config.get("architectures") or [_BY_MODEL_TYPE.get(config.get("model_type", ""))]
        if (architecture := names[0]) not in _FAMILIES:
            raise UnsupportedModel(f"{architecture} has no vision tower that is supported; {', '.join(_FAMILIES)} have one")
        family = _FAMILIES[architecture]
        vision = config.get("vision_config") or {}
        hidden_size = read_count(vision, family.hidden_key, family.hidden_size)
        num_heads = read_count(vision, "num_heads", 16)
        if hidden_size % num_heads or hidden_size // num_heads % 8:
            raise UnsupportedModel(
                f"config.json: {num_heads} heads of a vision tower of {hidden_size} are not of a multiple of 8 dimensions each"
            )
        intermediate = family.intermediate_size
        if intermediate is None:
            intermediate = int(hidden_size * vision.get("mlp_ratio", 4))
        else:
            intermediate = read_count(vision, "intermediate_size", intermediate)
        patch_size, merge_size = _side(vision, "patch_size", family.patch_size), read_count(vision, "spatial_merge_size", 2)
        depth = read_count(vision, "depth", family.depth)
        window = None
        if family.window_size is not None:
            window = read_count(vision, "window_size", family.window_size) // merge_size // patch_size
            if window < 1:
                raise UnsupportedModel("config.json: window_size of the vision tower is less than a token")
        side = None
        if family.num_positions is not None:
            positions = read_count(vision, "num_position_embeddings", family.num_positions)
            side = math.isqrt(positions)
            if side**2 != positions:
                raise UnsupportedModel(f"config.json: num_position_embeddings of the vision tower is {positions}, not a square")
        full = family.full_attention_blocks
        seconds = family.tokens_per_second
        return cls(
            architecture=architecture,
            depth=depth,
            hidden_size=hidden_size,
            intermediate_size=intermediate,
            num_heads=num_heads,
            activation=_activation(vision, family),
            gated=family.gated,
            channels=read_count(vision, "in_channels", 3),
            patch_size=patch_size,
            temporal_patch_size=_side(vision, "temporal_patch_size", 2),
            patch_bias=family.patch_bias,
            merge_size=merge_size,
            out_hidden_size=read_count(vision, family.out_key, 3584),
            window=window,
            full_attention_blocks=_blocks(vision, "fullatt_block_indexes", full, depth) if window else (),
            positions_side=side,
            deepstack_blocks=_blocks(vision, "deepstack_visual_indexes", family.deepstack_blocks, depth) if side else (),
            rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
            tokens_per_second=None if seconds is None else float(vision.get("tokens_per_second", seconds)),
            steps_apart=family.steps_apart,
            image_token=read_count(config, "image_token_id", 151655),
            video_token=read_count(config, "video_token_id", 151656),
        )


def _activation(vision: Mapping[str, Any], family: _Family) -> VisionActivation:
    name = vision.get("hidden_act", family.act)
    if name not in _ACTIVATIONS or (family.gated and _ACTIVATIONS[name] not in ("silu", "gelu_tanh")):
        raise UnsupportedModel(f"config.json: the activation {name!r} of the vision tower is not supported")
    return _ACTIVATIONS[name]


def _side(vision: Mapping[str, Any], key: str, default: int) -> int:
    """A size that may be given for each direction."""
    value = vision.get(key, default)
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    return read_count({key: value}, key)


def _blocks(vision: Mapping[str, Any], key: str, default: tuple[int, ...], depth: int) -> tuple[int, ...]:
    value = vision.get(key, default)
    if not isinstance(value, list | tuple) or not all(isinstance(each, int) for each in value):
        raise UnsupportedModel(f"config.json: {key} of the vision tower is {value!r}, not a list of numbers")
    if list(value) != sorted(set(value)) or (value and not 0 <= value[0] <= value[-1] < depth):
        raise UnsupportedModel(f"config.json: {key} of the vision tower is {value!r}, not ascending numbers below {depth}")
    return tuple(value)
