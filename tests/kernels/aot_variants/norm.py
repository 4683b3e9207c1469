"""Norms of Qwen2.5-7B and Llama-3.1-8B and of wide models, and short rows of which several share a program."""

from aot_variants import TARGETS, Variant

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(
    name: str, x: str, hidden: int, block: tuple[int, int], num_warps: int, *, residual: bool, out: str = "*bf16"
) -> Variant:
    pointers = {"x_ptr": x, "residual_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": out}
    constants = {"HIDDEN": hidden, "BLOCK_TOKENS": block[0], "BLOCK_HIDDEN": block[1], "USE_RESIDUAL": residual}
    constants |= {"USE_SCALES": out != "*bf16"} | ({} if out != "*bf16" else {"scales_ptr": None})
    if out != "*bf16":
        pointers["scales_ptr"] = "*fp32"
    return Variant(
        name,
        "norm.kernel:rms_norm_kernel",
        {**pointers, "tokens": "i32", "x_stride": "i32:16", "eps": "fp32"},
        constants,
        num_warps=num_warps,
        instructions=WIDE_ACCESS,
        max_registers=128,
        targets=TARGETS if out != "*fp8e4nv" else ("sm_89", "sm_90"),
    )


VARIANTS = [
    variant("add_rms_norm-3584", "*bf16", 3584, (1, 4096), 8, residual=True),
    variant("add_rms_norm-8192", "*bf16", 8192, (1, 8192), 16, residual=True),
    variant("add_rms_norm-16384", "*bf16", 16384, (1, 16384), 16, residual=True),
    variant("rms_norm-4096", "*fp32", 4096, (1, 4096), 8, residual=False),
    variant("add_rms_norm-576", "*bf16", 576, (4, 1024), 8, residual=True),
    variant("add_rms_norm-3584-int8", "*bf16", 3584, (1, 4096), 16, residual=True, out="*i8"),
    variant("add_rms_norm-8192-float8", "*bf16", 8192, (1, 8192), 32, residual=True, out="*fp8e4nv"),
    variant("add_rms_norm-16384-int8", "*bf16", 16384, (1, 16384), 16, residual=True, out="*i8"),
]
