"""Feed-forward layers of Qwen2.5-7B, and of a model narrow enough that rows share a program."""

from aot_variants import TARGETS, Variant
from dashinfer_kernels.activation.launch import quantized_tile

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(name: str, dtype: str, intermediate: int, block: tuple[int, int], *, gelu: bool) -> Variant:
    constants = {"INTERMEDIATE": intermediate, "BLOCK_TOKENS": block[0], "BLOCK_COLUMNS": block[1], "USE_GELU": gelu}
    signature = {"gate_up_ptr": dtype, "out_ptr": dtype, "tokens": "i32"}
    return Variant(name, "activation.kernel:gated_kernel", signature, constants, instructions=WIDE_ACCESS, max_registers=64)


def quantized(name: str, out: str, intermediate: int, *, gelu: bool) -> Variant:
    first, rest, num_warps = quantized_tile(intermediate)
    return Variant(
        name,
        "activation.kernel:quantized_gated_kernel",
        {"gate_up_ptr": "*bf16", "values_ptr": out, "scales_ptr": "*fp32"},
        {"INTERMEDIATE": intermediate, "BLOCK_FIRST": first, "BLOCK_REST": rest, "USE_GELU": gelu},
        num_warps=num_warps,
        targets=TARGETS if out == "*i8" else ("sm_89", "sm_90"),
        instructions=WIDE_ACCESS,
        max_registers=128,
    )


VARIANTS = [
    variant("silu_mul-18944", "*bf16", 18944, (1, 2048), gelu=False),
    variant("gelu_mul-512", "*fp16", 512, (4, 512), gelu=True),
    quantized("silu_mul-18944-float8", "*fp8e4nv", 18944, gelu=False),
    quantized("silu_mul-29568-int8", "*i8", 29568, gelu=False),
    quantized("gelu_mul-14336-int8", "*i8", 14336, gelu=True),
]
