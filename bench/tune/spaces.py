"""Which launch parameters are tried for each op: configs as the op's `tuning.lookup` expects them, the likeliest first."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from bench.ops import (
    activation,
    attention,
    layer_norm,
    linear,
    norm,
    quant_matmul,
    quantize_rows,
    rope,
    rotate,
    sampling,
    scaled_matmul,
    varlen_attention,
)
from bench.ops.case import Job, Place

Config = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """An op's name in the table, the cases that it is measured on, and its candidates."""

    op: str
    jobs: Callable[[Place], list[Job]]
    candidates: tuple[Config, ...]


def grid(**values: tuple[Any, ...]) -> tuple[Config, ...]:
    """All combinations; the last name's values change first."""
    return tuple(dict(zip(values, each, strict=True)) for each in product(*values.values()))


def _decode_candidates() -> tuple[Config, ...]:
    tiles = grid(num_warps=(4, 8), programs=(6, 4, 8), block_n=(64, 128, 32), num_stages=(3, 4, 2))
    return tuple(tile | {"min_chunk": max(1, 256 // tile["block_n"])} for tile in tiles)


def _prefill_candidates() -> tuple[Config, ...]:
    tiles = grid(use_descriptor=(False, True), block_m=(128, 64), num_stages=(2, 3), block_n=(64, 128, 32), num_warps=(8, 4))
    # a descriptor's tile lies within one block
    return tuple(tile for tile in tiles if not tile["use_descriptor"] or tile["block_n"] <= attention.LARGE_BLOCK)


def _weight_only_candidates() -> tuple[Config, ...]:
    """Tiles for few rows, tiles for many, and the library."""
    few = grid(
        BLOCK_OUT=(128, 64, 256), BLOCK_ROWS=(16, 64), SPLITS=(1, 2, 4, 8), num_stages=(3, 4), SCALE=("sums", "weights"),
        num_warps=(4, 8), BLOCK_WORDS=(64,),
    )  # fmt: skip
    many = grid(
        BLOCK_OUT=(128, 64), BLOCK_ROWS=(128, 256), SPLITS=(1, 2), num_stages=(3, 2), SCALE=("weights",), num_warps=(4, 8),
        BLOCK_WORDS=(32, 64),
    )  # fmt: skip
    return ({"UNPACK": True}, *(tile | {"GROUP_ROWS": 8, "UNPACK": False} for tile in (*few, *many)))


def _invariant_linear_candidates() -> tuple[Config, ...]:
    return grid(
        BLOCK_ROWS=(128, 64, 32), BLOCK_OUT=(64, 128), BLOCK_IN=(64, 32), GROUP_ROWS=(8,), num_warps=(4, 8),
        num_stages=(4, 3, 2),
    )  # fmt: skip


SPACES = {
    space.op: space
    for space in (
        Space("paged_attention_decode", attention.decode_jobs, _decode_candidates()),
        Space("prefill_attention", attention.prefill_jobs, _prefill_candidates()),
        Space("rms_norm", norm.jobs, grid(num_warps=(8, 4, 16, 32, 2), rows=(1, 2, 4))),
        Space("rope_kv_write", rope.jobs, grid(num_warps=(4, 8, 2), rows=(16, 32, 8, 64))),
        Space("layer_norm", layer_norm.jobs, grid(num_warps=(8, 4, 16, 32, 2), rows=(1, 2, 4))),
        Space("rotate_heads", rotate.jobs, grid(num_warps=(4, 8, 2), rows=(16, 32, 8, 64))),
        Space("gated", activation.jobs, grid(num_warps=(4, 8, 2), columns=(2048, 1024, 4096), rows=(1, 2))),
        Space(
            "varlen_attention",
            varlen_attention.jobs,
            grid(BLOCK_M=(128, 64), num_stages=(2, 3), BLOCK_N=(64, 128, 32), num_warps=(8, 4)),
        ),
        Space("weight_only", quant_matmul.weight_only_jobs, _weight_only_candidates()),
        Space("scaled_linear", scaled_matmul.many_row_jobs, grid(form=("gemm", "stream", "wide", "64", "32", "16"))),
        Space("quantize_rows", quantize_rows.plain_jobs, grid(num_warps=(8, 4, 16, 2), rows=(1, 2, 4))),
        Space("quantized_rms_norm", quantize_rows.norm_jobs, grid(num_warps=(16, 8, 32, 4), rows=(1, 2, 4))),
        Space("quantized_gated", quantize_rows.gated_jobs, grid(num_warps=(16, 8, 4, 32))),
        Space("invariant_linear", linear.invariant_jobs, _invariant_linear_candidates()),
        Space("sampling", sampling.jobs, grid(tiles=(1, 2, 4, 8, 16, 32))),
    )
}
