"""Feed-forward layers of Qwen2.5-7B, and of a model narrow enough that rows share a program."""

from aot_variants import Variant

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(name: str, dtype: str, intermediate: int, block: tuple[int, int], *, gelu: bool) -> Variant:
    constants = {"INTERMEDIATE": intermediate, "BLOCK_TOKENS": block[0], "BLOCK_COLUMNS": block[1], "USE_GELU": gelu}
    signature = {"gate_up_ptr": dtype, "out_ptr": dtype, "tokens": "i32"}
    return Variant(name, "activation.kernel:gated_kernel", signature, constants, instructions=WIDE_ACCESS, max_registers=64)


VARIANTS = [
    variant("silu_mul-18944", "*bf16", 18944, (1, 2048), gelu=False),
    variant("gelu_mul-512", "*fp16", 512, (4, 512), gelu=True),
]
