"""The tensors that a checkpoint has of a vision tower: names, and the shapes that its config implies. Knows no torch.

Names begin with `visual.`, which newer files call `model.visual.`.
"""

import math
from dataclasses import dataclass

from dashinfer.models.vision_config import VisionConfig

PATCHES, POSITIONS = "visual.patch_embed.proj", "visual.pos_embed.weight"


@dataclass(frozen=True)
class TowerNames:
    """What the layers of a family are called, within a block or a merger."""

    mlp: tuple[str, ...]  # gate, up and down, or up and down
    merger_norm: str
    merger_mlp: tuple[str, str]

    @classmethod
    def of(cls, config: VisionConfig) -> "TowerNames":
        if config.positions_side is not None:
            return cls(("linear_fc1", "linear_fc2"), "norm", ("linear_fc1", "linear_fc2"))
        return cls(("gate_proj", "up_proj", "down_proj") if config.gated else ("fc1", "fc2"), "ln_q", ("mlp.0", "mlp.2"))


def tower_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape. Matrices are [outputs, inputs], the patch embedding [outputs, channels, pictures, rows, columns]."""
    names, hidden = TowerNames.of(config), config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, shape: tuple[int, ...], *, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    patch = (config.channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    add(PATCHES, (hidden, *patch), bias=config.patch_bias)
    if config.positions_side is not None:
        shapes[POSITIONS] = (config.positions_side**2, hidden)
    for block in range(config.depth):
        prefix = f"visual.blocks.{block}."
        for norm in ("norm1", "norm2"):
            add(f"{prefix}{norm}", (hidden,), bias=not config.gated)
        add(f"{prefix}attn.qkv", (3 * hidden, hidden))
        add(f"{prefix}attn.proj", (hidden, hidden))
        for name in names.mlp[:-1]:
            add(f"{prefix}mlp.{name}", (config.intermediate_size, hidden))
        add(f"{prefix}mlp.{names.mlp[-1]}", (hidden, config.intermediate_size))
    merged = hidden * config.merge_size**2
    mergers = {"visual.merger.": hidden}
    mergers |= {f"visual.deepstack_merger_list.{level}.": merged for level in range(len(config.deepstack_blocks))}
    for prefix, normed in mergers.items():
        add(f"{prefix}{names.merger_norm}", (normed,), bias=not config.gated)
        add(f"{prefix}{names.merger_mlp[0]}", (merged, merged))
        add(f"{prefix}{names.merger_mlp[1]}", (config.out_hidden_size, merged))
    return shapes


def tower_bytes(config: VisionConfig, itemsize: int) -> int:
    """Bytes of a tower whose weights take `itemsize` bytes each."""
    return itemsize * sum(math.prod(shape) for shape in tower_shapes(config).values())
