"""Weight-only products of Qwen2.5-7B's layers as the heuristic launches them, for few rows and many."""

import math
from typing import Any

from aot_variants import TARGETS, Variant
from dashinfer_kernels.quant_matmul.weight_only import choose_config

GENERATION = {"sm_80": "ampere", "sm_86": "ada", "sm_90": "hopper", "gfx942": "amd"}
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 72, "sm_90": 132, "gfx942": 304}
TENSOR_CORES = {
    "sm_80": (r"mma\.sync",),
    "sm_86": (r"mma\.sync",),
    "sm_90": (r"wgmma\.mma_async\S* \{[^}]*\}, \{",),
    "gfx942": (r"v_mfma",),
}
# Words, 16 bytes a thread, go to shared memory, and from there to registers in the order of the tensor cores.
COPIES = (r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", r"ldmatrix\.sync\.aligned\.m8n8\.x4")


def variant(
    target: str,
    kind: str,
    rows: int,
    *,
    group: int | None = 128,
    offsets: str = "none",
    shape: tuple[int, int] = (37888, 3584),
    dtype: str = "bf16",
    scale_rows: int = 1,
    biased: bool = False,
) -> Variant:
    """`group`: inputs that share a scale; None: a whole row."""
    outputs, inputs = shape
    places = 4 if kind == "int4" else 2
    sub = 64 if group is None else math.gcd(group, 64)
    steps = -(-inputs // (places * sub))
    config = choose_config(
        rows,
        outputs,
        steps,
        wide=dtype == "fp32",
        shifted=offsets != "none",
        multiprocessors=MULTIPROCESSORS[target],
        generation=GENERATION[target],
    )
    assert config is not None
    constants: dict[str, Any] = {key: value for key, value in config.items() if key.isupper() and key != "SPLITS"}
    constants |= {"IN_FEATURES": inputs, "GROUP_SIZE": group or steps * places * sub, "SCALE_ROWS": scale_rows, "SUB": sub}
    constants |= {
        "PLACES": places,
        "KIND": kind,
        "OFFSETS": offsets,
        "USE_SERIAL_SPLITS": False,
        "USE_SHARED_SPLITS": config["SPLITS"] > 1,
        "USE_BIAS": biased,
    }
    constants |= {"BLOCK_WORDS": min(sub, config["BLOCK_WORDS"]), "USE_PTX": target != "gfx942" and dtype != "fp32"}
    constants["PRECISION"] = "ieee" if target == "gfx942" else "tf32x3"
    if offsets == "offsets" or group is None:
        constants["SCALE"] = "weights" if offsets == "offsets" else "end"
    signature = {"x_ptr": f"*{dtype}", "words_ptr": "*i16", "scales_ptr": "*fp32" if kind == "float8" else "*fp16"}
    signature |= {"offsets_ptr": {"none": "*i16", "zeros": "*u8", "offsets": "*fp16"}[offsets], "bias_ptr": f"*{dtype}"}
    signature |= {"out_ptr": f"*{dtype}", "partial_ptr": "*fp32", "arrivals_ptr": "*i32", "rows": "i32"}
    signature |= {"out_features": "i32:16", "out_padded": "i32:16", "scale_stride": "i32:16", "splits": "i32"}
    instructions = TENSOR_CORES[target]
    if target != "gfx942":
        instructions += COPIES
    words = [kind, offsets, f"group{group or '-all'}", f"rows{rows}", f"{outputs}x{inputs}", dtype, target]
    return Variant(
        "-".join(["weight_only", *words]),
        "quant_matmul.kernel_weight_only:weight_only_kernel",
        signature,
        constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        targets=(target,),
        instructions={target: () if dtype == "fp32" else instructions},
    )


VARIANTS = [
    *(variant(target, "int4", rows) for target in TARGETS for rows in (1, 128)),
    variant("sm_90", "int4", 64),
    variant("sm_90", "int4", 16, shape=(3584, 3584), biased=True),
    variant("sm_90", "int4", 16, shape=(3584, 18944), offsets="zeros"),
    variant("sm_90", "int4", 16, group=32, offsets="zeros"),
    variant("sm_90", "int4", 16, offsets="offsets"),
    variant("sm_90", "int4", 128, offsets="offsets"),
    variant("sm_90", "int4", 128, shape=(3584, 18944)),
    *(variant(target, "int4", rows, offsets="zeros") for target in ("sm_80", "gfx942") for rows in (16, 128)),
    variant("sm_80", "int4", 64, offsets="zeros", group=32),
    *(variant("sm_80", "int4", rows, offsets="offsets") for rows in (64, 128)),
    variant("gfx942", "int4", 16, offsets="offsets"),
    *(variant(target, "int8", rows, group=None) for target in TARGETS for rows in (16, 128)),
    variant("sm_90", "float8", 16, group=None),
    variant("sm_90", "float8", 128, scale_rows=128, dtype="fp16"),
    variant("sm_80", "float8", 16, group=None),
    variant("gfx942", "float8", 16, group=None),
    variant("sm_86", "int4", 64, shape=(4096, 4096)),
    *(variant("sm_86", "int4", rows, offsets=kind) for rows in (64, 128) for kind in ("zeros", "offsets")),
]
