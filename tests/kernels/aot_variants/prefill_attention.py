"""Prefill attention as its heuristic launches it: Qwen2.5-7B's heads, other head sizes, and the options that cost registers."""

from aot_variants import TARGETS, Variant
from dashinfer_kernels.attention.prefill import Shape, heuristic_config

TENSOR_CORES = {"sm_80": (r"mma\.sync",), "sm_90": (r"wgmma\.mma_async",), "gfx942": (r"v_mfma",)}
GENERATION = {"sm_80": "ampere", "sm_90": "hopper", "gfx942": "amd"}


def variant(
    target: str,
    head_dim: int,
    block_size: int,
    *,
    short: bool = False,
    kv: str = "bf16",
    heads: tuple[int, int] = (28, 4),
    options: bool = False,
) -> Variant:
    """`options`: with a window and a soft cap."""
    quantized = kv != "bf16"
    shape = Shape(head_dim, block_size, quantized=quantized, wide=False, windowed=options, short=short)
    config = heuristic_config(shape, GENERATION[target])
    block_d = 1 << (head_dim - 1).bit_length()
    signature = {"q_ptr": "*bf16", "cache_ptr": f"*{kv}", "out_ptr": "*bf16"}
    signature |= dict.fromkeys(("tiles_ptr", "query_starts_ptr", "context_lengths_ptr", "block_tables_ptr"), "*i32")
    signature |= {"q_stride_token": "i32:16", "q_stride_head": "i32:16", "table_stride": "i32"}
    signature |= {"score_scale": "fp32", "cap_scale": "fp32", "window": "i32"}
    constants = {
        "NUM_KV_HEADS": heads[1],
        "GROUP": heads[0] // heads[1],
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_d,
        "USE_DESCRIPTOR": config.use_descriptor,
        "USE_SCALES": quantized,
        "USE_WINDOW": options,
        "USE_SOFTCAP": options,
        "PRECISION": "ieee" if target == "gfx942" else "tf32x3",
    }
    instructions = TENSOR_CORES[target]
    if config.use_descriptor:
        signature["cache_desc"] = f"tensordesc<{kv}[{config.block_n},{block_d}]>"
        instructions += (r"cp\.async\.bulk\.tensor",)
    else:
        constants["cache_desc"] = None
    if quantized:
        signature["scales_ptr"] = "*fp32"
    else:
        constants["scales_ptr"] = None
    words = [head_dim, f"block{block_size}", kv, "short" if short else "long", *(["options"] if options else []), target]
    return Variant(
        "-".join(map(str, ["prefill", *words])),
        "attention.kernel_prefill:prefill_kernel",
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        instructions={target: instructions},
    )


VARIANTS = [
    *(variant(target, 128, 16, options=True) for target in TARGETS),
    *(variant(target, 256, 16, kv="i8", options=True) for target in TARGETS),
    *(variant(target, 96, 64, options=True) for target in TARGETS),
    *(variant("sm_90", head_dim, 64) for head_dim in (64, 80, 128, 256)),
    variant("sm_90", 128, 128, heads=(32, 8), options=True),
    variant("sm_90", 128, 128, heads=(8, 8)),
    variant("sm_90", 256, 64, options=True),
    variant("sm_90", 128, 64, short=True, options=True),
    variant("sm_90", 256, 64, short=True, options=True),
    variant("sm_90", 128, 64, kv="fp8e4nv", options=True),
    variant("sm_90", 64, 128, kv="i8", options=True),
    *(variant("sm_90", head_dim, 64, kv=kv) for head_dim in (64, 128) for kv in ("i8", "fp8e4nv")),
    *(variant("sm_90", head_dim, 64, kv=kv, short=True) for head_dim in (64, 128) for kv in ("i8", "fp8e4nv")),
    variant("sm_80", 128, 64, kv="i8"),
    variant("sm_80", 64, 16, options=True),
    variant("sm_80", 128, 16, short=True, options=True),
]
