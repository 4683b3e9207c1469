"""Vision towers' head sizes, with the parameters that the heuristic gives each target."""

import torch

from aot_variants import TARGETS, Variant
from dashinfer_kernels.varlen_attention.launch import heuristic, split_head

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUMBERS = ["num_sequences", "tiles_per_sequence", "num_heads"]
STRIDES = ["stride_q", "stride_q_head", "stride_k", "stride_k_head", "stride_v", "stride_v_head"]
INSTRUCTIONS = {
    "sm_80": (r"mma\.sync", r"cp\.async\.cg\.shared\.global"),
    "sm_90": (r"wgmma\.mma_async", r"cp\.async\.cg\.shared\.global"),
    "gfx942": ("v_mfma",),
}


def variant(target: str, head_dim: int, dtype: str = "bf16", *, small: bool = False, group: int = 1) -> Variant:
    config = heuristic(target, TYPES[dtype], head_dim, small=small)
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    constants = {"GROUP": group, "HEAD_DIM": head_dim, **split_head(head_dim)}
    constants |= {"BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "BLOCK_S": 256}
    constants |= {"USE_SEARCH": not small, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    return Variant(
        f"varlen_attention-{head_dim}-{dtype}{'-small' if small else ''}-{target}",
        "varlen_attention.kernel:varlen_attention_kernel",
        {**pointers, "cu_seqlens_ptr": "*i32", **dict.fromkeys(NUMBERS + STRIDES, "i32"), "scale_log2": "fp32"},
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        targets=(target,),
        instructions={} if dtype == "fp32" else INSTRUCTIONS,
    )


VARIANTS = [
    *(variant("sm_90", head_dim) for head_dim in (64, 72, 80, 96, 128)),
    variant("sm_90", 80, "fp16", group=2),
    *(variant("sm_90", head_dim, small=True) for head_dim in (72, 80, 128)),
    *(variant("sm_80", head_dim) for head_dim in (72, 128)),
    *(variant("sm_80", head_dim, small=True) for head_dim in (80, 128)),
    *(variant("gfx942", head_dim) for head_dim in (72, 128)),
    variant("gfx942", 80, small=True),
    *(variant(target, 128, "fp32") for target in TARGETS),
]
