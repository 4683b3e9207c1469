"""The rotary embedding's settings, read from a Hugging Face config in either of its two spellings.

Older files have `rope_theta` and `partial_rotary_factor` beside a `rope_scaling` table whose kind is called `type`; newer ones
have all of it in `rope_parameters`, where the kind is called `rope_type`. Knows no torch: what it cannot serve it refuses
before anything heavy is imported. The tables themselves are made in `rope.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dashinfer.errors import UnsupportedModel

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn into rotations. `original_positions` is the length in tokens that it was first trained for."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    rotary_dim: int  # of head_dim; the rest of a head is left as it is
    original_positions: int
    factor: float = 1.0  # linear, dynamic, llama3, yarn: how much longer than `original_positions`
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: rotations above which a dimension is extrapolated
    beta_slow: float = 1.0  # yarn: rotations below which it is interpolated
    truncate: bool = True  # yarn: round the limits between the two to whole dimensions
    attention_factor: float = 1.0  # yarn: cos and sin are multiplied by it
    mrope_section: tuple[int, int, int] | None = None  # frequencies turned by temporal, height and width positions
    mrope_interleaved: bool = False  # those frequencies take turns, instead of lying together

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        *,
        head_dim: int,
        max_position_embeddings: int,
        default_theta: float = 10000.0,
        default_mrope: tuple[tuple[int, int, int], bool] | None = None,
    ) -> "RopeConfig":
        """
        Args:
            default_mrope: sections, and whether they are interleaved, where the config says nothing; None: a model whose tokens
                have one position each.

        Raises:
            UnsupportedModel: a kind that is not known, or settings that make no sense.
        """
        table = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        if any(isinstance(value, Mapping) for value in table.values()):
            raise UnsupportedModel("config.json: rotary embeddings that differ by the kind of layer are not supported")
        kind = table.get("rope_type") or table.get("type") or "default"
        if kind == "mrope" and default_mrope is not None:
            kind = "default"
        if kind not in get_args(RopeKind):
            raise UnsupportedModel(
                f"config.json: rotary embeddings of the type {kind!r} are not supported; "
                f"supported are {', '.join(get_args(RopeKind))}"
            )
        if "mrope_section" in table and default_mrope is None:
            raise UnsupportedModel("config.json: multimodal rotary embeddings (mrope_section) of a model without vision")

        def number(key: str, default: float | None) -> float:
            value = table.get(key)
            if value is None:
                value = config.get(key) if key in ("rope_theta", "partial_rotary_factor") else None
            if value is None:
                value = default
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise UnsupportedModel(f"config.json: {key} of the rotary embedding is {value!r}, not a positive number")
            return float(value)

        original = max_position_embeddings
        if kind in ("llama3", "yarn"):
            outside = config.get("original_max_position_embeddings")
            original = int(outside or number("original_max_position_embeddings", max_position_embeddings))
        rotary_dim = int(head_dim * number("partial_rotary_factor", 1.0))
        if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
            raise UnsupportedModel(f"config.json: {rotary_dim} rotated dimensions of heads of {head_dim} cannot be paired")
        rope = {"kind": kind, "rotary_dim": rotary_dim, "original_positions": original}
        rope["theta"] = number("rope_theta", default_theta)
        if default_mrope is not None:
            rope["mrope_section"] = _section(table.get("mrope_section", default_mrope[0]), rotary_dim)
            rope["mrope_interleaved"] = bool(table.get("mrope_interleaved", default_mrope[1]))
        if kind == "default":
            return cls(**rope)

        fallback = max_position_embeddings / original if kind == "yarn" else None
        factor = rope["factor"] = number("factor", fallback)
        if kind == "llama3":
            rope["low_freq_factor"] = number("low_freq_factor", None)
            rope["high_freq_factor"] = number("high_freq_factor", None)
        elif kind == "yarn":
            rope["beta_fast"] = number("beta_fast", 32.0)
            rope["beta_slow"] = number("beta_slow", 1.0)
            rope["truncate"] = bool(table.get("truncate", True))
            if table.get("attention_factor") is not None:
                rope["attention_factor"] = number("attention_factor", None)
            elif table.get("mscale") and table.get("mscale_all_dim"):
                scales = [_magnitude(factor, number(key, None)) for key in ("mscale", "mscale_all_dim")]
                rope["attention_factor"] = scales[0] / scales[1]
            else:
                rope["attention_factor"] = _magnitude(factor, 1.0)
        elif kind == "dynamic" and rotary_dim == 2:
            raise UnsupportedModel("config.json: dynamic rotary embeddings need more than 2 rotated dimensions")
        return cls(**rope)

    def reach(self, max_position_embeddings: int) -> int:
        """The longest sequence, in tokens, that these settings are meant for."""
        if self.kind in ("linear", "dynamic", "yarn"):
            return max(max_position_embeddings, int(self.original_positions * self.factor))
        return max_position_embeddings


def _section(value: Any, rotary_dim: int) -> tuple[int, int, int]:
    counts = list(value) if isinstance(value, list | tuple) else []
    if len(counts) != 3 or not all(isinstance(count, int) and count >= 0 for count in counts) or 2 * sum(counts) != rotary_dim:
        raise UnsupportedModel(
            f"config.json: mrope_section is {value!r}, not three numbers that make {rotary_dim // 2} frequencies together"
        )
    return counts[0], counts[1], counts[2]


def _magnitude(factor: float, scale: float) -> float:
    """YaRN's correction for the entropy of attention over a longer context (arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
