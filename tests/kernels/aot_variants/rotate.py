"""Rotation of queries and keys in the towers of Qwen2-VL (heads of 80) and Qwen3-VL (72), and of heads of 64."""

from aot_variants import Variant

WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32"), "gfx942": (r"dwordx4",)}


def variant(head_dim: int, block: tuple[int, int]) -> Variant:
    return Variant(
        f"rotate_heads-{head_dim}",
        "rotate.kernel:rotate_heads_kernel",
        {"heads_ptr": "*bf16", "angles_ptr": "*fp32", "tokens": "i32", "stride": "i32:16"},
        {"HEADS": 32, "HEAD_DIM": head_dim, "BLOCK_ROWS": block[0], "BLOCK_HALF": block[1]},
        instructions=WIDE_ACCESS if head_dim % 16 == 0 else {},
        max_registers=64,
    )


VARIANTS = [variant(80, (16, 64)), variant(72, (16, 64)), variant(64, (32, 32))]
