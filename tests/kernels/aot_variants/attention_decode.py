"""Decode attention of Qwen2.5-7B, Llama-3.1-8B and Gemma-2, and of odd head sizes, at the heuristic's launch parameters.

On Hopper three programs share a multiprocessor, hence their bound on registers; with Triton 3.6, two of quantised caches do.
Keys and values are loaded 16 bytes at a time.
"""

from aot_variants import Variant
from dashinfer_kernels.attention import decode

SIZES = {"*bf16": 2, "*fp32": 4, "*i8": 1, "*fp8e4nv": 1, "*u8": 1}
NVIDIA, AMD = ("sm_80", "sm_90"), ("gfx942",)
COPY = r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
THREE_PROGRAMS, TWO_PROGRAMS = 168, 248


def attend(
    name: str,
    heads: tuple[int, int],
    head_dim: int,
    *,
    q: str = "*bf16",
    kv: str | None = None,
    block_size: int = 16,
    query_len: int = 1,
    softcap: bool = False,
    window: bool = False,
    targets: tuple[str, ...] = NVIDIA,
    max_registers: int | None = THREE_PROGRAMS,
) -> Variant:
    """`kv` is what a quantised cache holds."""
    block_m = decode.choose_block_m(query_len * heads[0] // heads[1])
    config = decode.choose_config(head_dim, SIZES[kv or q], block_m, hip=targets == AMD)
    signature = {"q_ptr": q, "kv_ptr": kv or q, "tables_ptr": "*i32", "context_lengths_ptr": "*i32", "items_ptr": "*i32"}
    signature |= {"item_starts_ptr": "*i32", "out_ptr": q, "partial_ptr": "*fp32", "stats_ptr": "*fp32"}
    signature |= {"num_sequences": "i32", "q_stride": "i32:16", "table_stride": "i32", "window": "i32"}
    signature |= {"score_scale": "fp32", "softcap": "fp32"}
    constants = {"NUM_HEADS": heads[0], "NUM_KV_HEADS": heads[1], "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size}
    constants |= {"QUERY_LEN": query_len, "BLOCK_M": block_m}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_D": 1 << (head_dim - 1).bit_length(), "USE_SCALES": kv is not None}
    constants |= {"USE_SOFTCAP": softcap, "USE_WINDOW": window, "USE_PTX": targets != AMD}
    if kv is None:
        constants["kv_scales_ptr"] = None
    else:
        signature["kv_scales_ptr"] = "*fp32"
    return Variant(
        f"decode-{name}",
        "attention.kernel_decode:attend",
        signature,
        constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        targets=targets,
        instructions={"sm_80": (COPY, r"mma\.sync"), "sm_90": (COPY, r"mma"), "gfx942": (r"v_mfma",)},
        max_registers=max_registers,
    )


SCHEDULE = Variant(
    "decode-schedule",
    "attention.kernel_decode:schedule",
    {"context_lengths_ptr": "*i32", "items_ptr": "*i32", "item_starts_ptr": "*i32", "num_sequences": "i32"}
    | {"workers": "i32", "min_chunk": "i32", "window": "i32"},
    {"QUERY_LEN": 1, "BLOCK_N": 64, "BLOCK_SEQUENCES": 256, "BLOCK_ITEMS": 128, "USE_WINDOW": True, "USE_OWN_LENGTH": False},
)


def merge(items: int, columns: int) -> Variant:
    return Variant(
        f"decode-merge-{items}x{columns}",
        "attention.kernel_decode:merge",
        {"partial_ptr": "*fp32", "stats_ptr": "*fp32", "item_starts_ptr": "*i32", "out_ptr": "*bf16"},
        {"NUM_HEADS": 28, "HEAD_DIM": 128, "QUERY_LEN": 1, "BLOCK_ITEMS": items, "BLOCK_COLUMNS": columns},
    )


VARIANTS = [
    attend("128", (28, 4), 128),
    attend("128-amd", (28, 4), 128, targets=AMD),
    attend("128-long-blocks", (32, 8), 128, block_size=64),
    attend("64", (14, 2), 64),
    attend("80", (32, 32), 80),
    attend("80-amd", (32, 32), 80, targets=AMD),
    attend("96", (32, 8), 96),
    attend("256-window-softcap", (8, 4), 256, window=True, softcap=True),
    attend("256-window-softcap-amd", (8, 4), 256, window=True, softcap=True, targets=AMD),
    attend("128-int8", (28, 4), 128, kv="*i8", max_registers=TWO_PROGRAMS),
    *(
        attend(f"{head_dim}-{name}-long-blocks", (heads, 8), head_dim, kv=kv, block_size=64, targets=targets)
        for head_dim, heads in ((64, 32), (128, 64))
        for name, kv, targets in (("int8", "*i8", NVIDIA), ("float8", "*fp8e4nv", ("sm_90",)))
    ),
    attend("128-int8-amd", (28, 4), 128, kv="*i8", targets=AMD),
    attend("128-float8", (28, 4), 128, kv="*fp8e4nv", targets=("sm_90",), max_registers=TWO_PROGRAMS),
    attend("128-float8-bits", (28, 4), 128, kv="*u8", targets=("sm_80",), max_registers=TWO_PROGRAMS),
    attend("128-4-tokens", (32, 4), 128, query_len=4, max_registers=None),
    attend("128-int8-8-tokens", (32, 4), 128, kv="*i8", query_len=8, max_registers=None),
    attend("128-float32", (32, 8), 128, q="*fp32", max_registers=None),
    SCHEDULE,
    merge(128, 32),
    merge(16, 256),
]
