"""Norms of Qwen2.5-7B and Llama-3.1-8B and of wide models, short rows of which several share a program, and the layer norms of
Qwen2-VL's tower and of Qwen3-VL's mergers."""

from aot_variants import Variant

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(
    name: str, x: str, hidden: int, block: tuple[int, int], num_warps: int, *, residual: bool, layer: bool = False
) -> Variant:
    pointers = {"x_ptr": x, "residual_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
    if layer:
        pointers["bias_ptr"] = "*fp32"
    constants = {"HIDDEN": hidden, "BLOCK_TOKENS": block[0], "BLOCK_HIDDEN": block[1], "USE_RESIDUAL": residual}
    return Variant(
        name,
        "norm.kernel:layer_norm_kernel" if layer else "norm.kernel:rms_norm_kernel",
        {**pointers, "tokens": "i32", "x_stride": "i32:16", "eps": "fp32"},
        constants,
        num_warps=num_warps,
        instructions=WIDE_ACCESS,
        max_registers=128,
    )


VARIANTS = [
    variant("add_rms_norm-3584", "*bf16", 3584, (1, 4096), 8, residual=True),
    variant("add_rms_norm-8192", "*bf16", 8192, (1, 8192), 16, residual=True),
    variant("add_rms_norm-16384", "*bf16", 16384, (1, 16384), 16, residual=True),
    variant("rms_norm-4096", "*fp32", 4096, (1, 4096), 8, residual=False),
    variant("add_rms_norm-576", "*bf16", 576, (4, 1024), 8, residual=True),
    variant("add_layer_norm-1280", "*bf16", 1280, (1, 2048), 4, residual=True, layer=True),
    variant("layer_norm-4608", "*fp32", 4608, (1, 8192), 16, residual=False, layer=True),
]
