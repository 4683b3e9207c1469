"""Products of 8-bit rows and weights as they are launched, and what quantises rows."""

from aot_variants import TARGETS, Variant
from dashinfer_kernels.quant_matmul.reference import Activations
from dashinfer_kernels.quant_matmul.scaled import Generation, configs

GENERATIONS: dict[str, Generation] = {"sm_80": "ampere", "sm_89": "ada", "sm_90": "hopper", "gfx942": "amd"}
COPY_ENGINE = r"cp\.async\.bulk\.tensor"
PRODUCTS = {
    ("sm_80", "int8"): (r"mma\.sync.*s8\.s8\.s32", r"cp\.async\.cg"),
    ("sm_89", "fp8"): (r"mma\.sync.*e4m3\.e4m3", r"cp\.async\.cg"),
    ("sm_90", "int8"): (r"wgmma\.mma_async.*s32\.s8\.s8", COPY_ENGINE),
    ("sm_90", "fp8"): (r"wgmma\.mma_async.*f32\.e4m3\.e4m3", COPY_ENGINE),
    ("gfx942", "int8"): (r"v_mfma_i32\w*i8",),
}


def product(target: str, activations: Activations, form: str, *, blocks: bool = False, biased: bool = True) -> Variant:
    config = configs(activations, GENERATIONS[target])[form]
    kind = {"int8": "i8", "fp8": "fp8e4nv"}[activations]
    descriptors = target == "sm_90"
    operands = {"x": f"*{kind}", "weight": f"*{kind}"}
    if descriptors:
        operands = {
            "x": f"tensordesc<{kind}[{config.block_rows},{config.block_in}]>",
            "weight": f"tensordesc<{kind}[{config.block_out},{config.block_in}]>",
        }
    signature = operands | {"x_scales_ptr": "*fp32", "weight_scales_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    signature |= {"rows": "i32", "out_features": "i32:16", "in_features": "i32:16"}
    constants = {"BLOCK_ROWS": config.block_rows, "BLOCK_OUT": config.block_out, "BLOCK_IN": config.block_in}
    constants |= {"USE_INT8": activations == "int8", "USE_BLOCKS": blocks, "USE_BIAS": biased, "USE_DESCRIPTORS": descriptors}
    if config.form == "gemm":
        constants["GROUP_ROWS"] = config.group_rows
    else:
        signature |= {"partial_ptr": "*i32" if activations == "int8" else "*fp32", "arrived_ptr": "*i32"}
    return Variant(
        "-".join(["scaled", activations, form, *(["blocks"] if blocks else []), target]),
        f"quant_matmul.kernel_scaled:{config.form}_kernel",
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=(target,),
        instructions={target: PRODUCTS[target, activations]},
        max_registers=128 if form == "16" and target == "sm_90" else None,
    )


def quantize(out: str, columns: int, block: int, num_warps: int) -> Variant:
    return Variant(
        f"quantize_rows-{columns}-{out.removeprefix('*')}",
        "quantize_rows.kernel:quantize_rows_kernel",
        {"x_ptr": "*bf16", "values_ptr": out, "scales_ptr": "*fp32", "rows": "i32", "x_stride": "i32:16"},
        {"COLUMNS": columns, "BLOCK_ROWS": 1, "BLOCK_COLUMNS": block},
        num_warps=num_warps,
        targets=TARGETS if out == "*i8" else ("sm_89", "sm_90"),
        instructions={"sm_90": (r"ld\.global[^;]*v4\.b32", r"st\.global[^;]*v4\.b32")},
        max_registers=64,
    )


VARIANTS = [
    *(product("sm_90", "fp8", form) for form in configs("fp8", "hopper")),
    *(product("sm_90", "fp8", form, blocks=True) for form in ("16", "64", "gemm")),
    *(product("sm_90", "int8", form, biased=form == "wide") for form in ("16", "64", "stream", "wide")),
    *(product("sm_80", "int8", form) for form in ("16", "64", "gemm")),
    *(product("sm_89", "fp8", form) for form in ("16", "64", "gemm")),
    product("sm_89", "fp8", "gemm", blocks=True),
    *(product("gfx942", "int8", form) for form in ("16", "gemm")),
    quantize("*fp8e4nv", 3584, 4096, 8),
    quantize("*i8", 8192, 8192, 16),
]
