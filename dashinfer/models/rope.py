"""The rotary embedding's table: cosines and sines of every position, made once while loading.

Each kind of scaling only changes the frequencies (and YaRN the size), so the ops need to know nothing of kinds.

Dynamic NTK scaling is defined by the length of the sequence at hand, which a table cannot follow, and which would leave cached
keys rotated by other frequencies than later queries. Here the length served decides instead: up to the model's own length the
table equals transformers' at every position; if a greater length is served, all positions have the frequencies of that length,
as transformers gives them to a prompt that long.
"""

import math

import torch
from torch import Tensor

from dashinfer.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, max_length: int, factors: Tensor | None = None) -> Tensor:
    """Radians that one position turns each pair of dimensions by: [rotary_dim / 2] float32.

    Args:
        max_length: the longest sequence served, in tokens; only dynamic scaling asks.
        factors: [rotary_dim / 2] float32, divides the unscaled frequencies in place of `rope`'s own scaling. GGUF files store
            Llama 3's scaling like this.
    """
    dim = rope.rotary_dim
    theta = rope.theta
    if rope.kind == "dynamic" and factors is None:
        stretch = rope.factor * max(max_length, rope.original_positions) / rope.original_positions - (rope.factor - 1)
        theta *= stretch ** (dim / (dim - 2))
    base = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if factors is not None:
        return base / factors
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base)
    return base


def rope_table(rope: RopeConfig, max_length: int, factors: Tensor | None = None) -> Tensor:
    """[max_length, rotary_dim] float32: of each position the cosines, then the sines, of its rotary_dim / 2 angles."""
    positions = torch.arange(max_length, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, max_length, factors))
    return torch.cat((angles.cos(), angles.sin()), dim=1).mul_(rope.attention_factor)


def _llama3(rope: RopeConfig, base: Tensor) -> Tensor:
    """Long wavelengths are stretched, short ones kept, and those between blended by how often they fit (Llama 3.1)."""
    turns = rope.original_positions * base / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * base / rope.factor + kept * base


def _yarn(rope: RopeConfig, base: Tensor) -> Tensor:
    """Extrapolates the dimensions that turn often, interpolates those that turn little (arXiv 2309.00071, section 3.2)."""

    def dimension(turns: float) -> float:
        return rope.rotary_dim * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low if high != low else 0.001  # a step where the limits meet
    interpolated = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return base / rope.factor * interpolated + base * (1 - interpolated)
