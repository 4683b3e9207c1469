"""Batch-invariant linear layers: the MLP's inputs and attention's output of Qwen2.5-7B, with descriptors and without."""

import torch

from aot_variants import Variant
from dashinfer_kernels.linear.launch import invariant_config

TENSOR_CORES = {"sm_80": (r"mma\.sync",), "sm_90": (r"wgmma\.mma_async",), "gfx942": (r"v_mfma",)}
COPY_ENGINE = r"cp\.async\.bulk\.tensor"


def variant(name: str, dtype: str, out_features: int, *, descriptors: bool, biased: bool, targets: tuple[str, ...]) -> Variant:
    config = invariant_config(torch.float32 if dtype == "fp32" else torch.bfloat16, out_features)
    block_rows, block_out, block_in = (config[key] for key in ("BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN"))
    operands = {"x": f"*{dtype}", "weight": f"*{dtype}"}
    if descriptors:
        operands = {
            "x": f"tensordesc<{dtype}[{block_rows},{block_in}]>",
            "weight": f"tensordesc<{dtype}[{block_out},{block_in}]>",
        }
    instructions = {} if dtype == "fp32" else dict(TENSOR_CORES)
    if descriptors:
        instructions["sm_90"] += (COPY_ENGINE,)
    return Variant(
        name,
        "linear.kernel:linear_kernel",
        {
            **operands,
            **{"bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"},
            **{"rows": "i32", "out_features": "i32:16"},
        },
        {
            **{key: value for key, value in config.items() if key.isupper()},
            **{"IN_FEATURES": 3584, "USE_BIAS": biased, "USE_DESCRIPTORS": descriptors},
        },
        num_warps=config["num_warps"],
        num_stages=2 if targets == ("gfx942",) else config["num_stages"],
        targets=targets,
        instructions=instructions,
    )


VARIANTS = [
    variant("invariant_linear-37888", "bf16", 37888, descriptors=True, biased=False, targets=("sm_90",)),
    variant("invariant_linear-3584", "bf16", 3584, descriptors=True, biased=True, targets=("sm_90",)),
    variant("invariant_linear-37888-sm_80", "bf16", 37888, descriptors=False, biased=False, targets=("sm_80",)),
    variant("invariant_linear-37888-gfx942", "bf16", 37888, descriptors=False, biased=False, targets=("gfx942",)),
    variant("invariant_linear-float32", "fp32", 3584, descriptors=False, biased=True, targets=("sm_90",)),
]
