"""Layer norms of Qwen2-VL's tower and of Qwen3-VL's mergers, and short rows of which several share a program."""

from aot_variants import Variant

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(name: str, x: str, hidden: int, block: tuple[int, int], num_warps: int, *, residual: bool) -> Variant:
    pointers = {"x_ptr": x, "residual_ptr": "*fp32", "weight_ptr": "*fp32", "bias_ptr": "*fp32", "out_ptr": "*bf16"}
    return Variant(
        name,
        "layer_norm.kernel:layer_norm_kernel",
        {**pointers, "tokens": "i32", "x_stride": "i32:16", "eps": "fp32"},
        {"HIDDEN": hidden, "BLOCK_TOKENS": block[0], "BLOCK_HIDDEN": block[1], "USE_RESIDUAL": residual},
        num_warps=num_warps,
        instructions=WIDE_ACCESS,
        max_registers=128,
    )


VARIANTS = [
    variant("add_layer_norm-1280", "*bf16", 1280, (1, 2048), 4, residual=True),
    variant("layer_norm-4608", "*fp32", 4608, (1, 8192), 16, residual=False),
    variant("add_layer_norm-256", "*bf16", 256, (8, 256), 4, residual=True),
]
