"""Rotation and cache write of Qwen2.5-7B, with QK-norm as in Qwen3, multimodal as in Qwen3-VL, and of odd head sizes."""

from typing import Any

from aot_variants import TARGETS, Variant

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(
    name: str,
    cache: str,
    heads: tuple[int, int],
    dims: tuple[int, int],
    block: tuple[int, int, int],
    *,
    block_size: int = 16,
    targets: tuple[str, ...] = TARGETS,
    **uses: Any,
) -> Variant:
    constants = {
        **dict(zip(("NUM_HEADS", "NUM_KV_HEADS"), heads, strict=True)),
        **dict(zip(("HEAD_DIM", "ROTARY_DIM"), dims, strict=True)),
        **dict(zip(("BLOCK_ROWS", "BLOCK_HALF", "BLOCK_REST"), block, strict=True)),
        **{
            "BLOCK_SIZE": block_size,
            "SECTION_T": 0,
            "SECTION_H": 0,
            "SECTION_W": 0,
            "LARGEST": {"*i8": 127.0}.get(cache, 448.0),
        },
        **dict.fromkeys(("USE_NORM", "USE_MROPE", "USE_INTERLEAVED"), False),
        **{"USE_SCALES": cache != "*bf16", **uses},
    }
    pointers = dict.fromkeys(("positions_ptr", "slot_mapping_ptr"), "*i64")
    floats = dict.fromkeys(("cos_sin_ptr", "kv_scales_ptr"), "*fp32")
    weights = dict.fromkeys(("qkv_ptr", "q_norm_ptr", "k_norm_ptr"), "*bf16")
    sizes = {"tokens": "i32", "positions_stride": "i32", "eps": "fp32"}
    return Variant(
        name,
        "rope.kernel:rope_kv_write_kernel",
        {**pointers, **floats, **weights, "kv_cache_ptr": cache, **sizes},
        constants,
        instructions=WIDE_ACCESS,
        max_registers=128,
        targets=targets,
    )


MULTIMODAL = {"USE_MROPE": True, "USE_INTERLEAVED": True, "SECTION_T": 24, "SECTION_H": 20, "SECTION_W": 20}
VARIANTS = [
    variant("rope-128", "*bf16", (28, 4), (128, 128), (16, 64, 0)),
    variant("rope-128-norm-int8", "*i8", (32, 8), (128, 128), (16, 64, 0), USE_NORM=True),
    variant("rope-128-norm-mrope-fp8", "*fp8e4nv", (32, 8), (128, 128), (16, 64, 0), USE_NORM=True, targets=("sm_90", "gfx942"),
            **MULTIMODAL),
    variant("rope-64-int8", "*i8", (32, 8), (64, 64), (32, 32, 0), block_size=64),
    variant("rope-64-fp8", "*fp8e4nv", (32, 8), (64, 64), (32, 32, 0), block_size=64, targets=("sm_90",)),
    variant("rope-128-fp8", "*fp8e4nv", (28, 4), (128, 128), (16, 64, 0), block_size=64, targets=("sm_90",)),
    variant("rope-80-partial-norm", "*bf16", (32, 32), (80, 32), (16, 16, 64), USE_NORM=True),
]  # fmt: skip
