"""Every kernel as a batch of 32 rows of Qwen2.5's vocabulary takes it, with all that it can do; and plain greedy sampling."""

from aot_variants import Variant

ROWS = {"slots_ptr": "*i32", "params_ptr": "*i32", "params_stride": "i32:16"}
LOGITS = {"logits_ptr": "*fp32", "logits_stride": "i32:16"}
PEAKS = {"peaks_ptr": "*fp32", "num_splits": "i32"}
GATHERED = {"brackets_ptr": "*i32", "found_ptr": "*i64", "above_ptr": "*i64", "keys_ptr": "*i32"}
VOCAB, SUMS = {"vocab": "i32:16"}, {"sums_ptr": "*i64"}
SIZES = VOCAB | {"tiles": "i32"}
TILED = {"BLOCK": 2048}
WIDE_ACCESS = {"sm_90": (r"ld\.global[^;]*v4\.b32",), "gfx942": (r"dwordx4",)}


def variant(
    name: str, signature: dict[str, str], constants: dict[str, object], num_warps: int = 4, suffix: str = ""
) -> Variant:
    return Variant(
        f"sampling-{name}{suffix}",
        f"sampling.kernel:{name}_kernel",
        signature,
        constants,
        num_warps=num_warps,
        instructions=WIDE_ACCESS if "tiles" in signature and constants.get("USE_DRAWS", True) else {},
        max_registers=168 if name in ("gather", "histogram", "threshold") else 128,
    )


VARIANTS = [
    variant("edit", {**LOGITS, **ROWS, "positions_ptr": "*i32"}, {"BLOCK": 128}),
    variant(
        "penalise",
        {
            **(LOGITS | ROWS | SIZES),
            "counts_ptr": "*i16",
            "bitmask_ptr": "*i32",
            "mask_rows_ptr": "*i32",
            "bitmask_stride": "i32",
        },
        {**TILED, "USE_PENALTIES": True, "USE_BITMASK": True},
    ),
    variant("peak", {**LOGITS, **SIZES, "slots_ptr": "*i32", "peaks_ptr": "*fp32", "places_ptr": "*i32"}, TILED),
    variant("histogram", LOGITS | ROWS | PEAKS | SIZES | SUMS | {"bins_ptr": "*i32"}, {**TILED, "SPLITS": 128}, num_warps=8),
    variant("bracket", ROWS | PEAKS | SUMS | {"bins_ptr": "*i32", "brackets_ptr": "*i32"}, {"SPLITS": 128}),
    variant("gather", LOGITS | ROWS | PEAKS | SIZES | GATHERED, {**TILED, "SPLITS": 128, "CAPACITY": 8192}),
    variant(
        "threshold",
        LOGITS | ROWS | PEAKS | VOCAB | GATHERED | SUMS | {"thresholds_ptr": "*i32"},
        {"SPLITS": 128, "CAPACITY": 8192, "BLOCK": 2048},
        num_warps=16,
    ),
    variant(
        "mass",
        LOGITS | ROWS | PEAKS | SIZES | {"thresholds_ptr": "*i32", "masses_ptr": "*i64"},
        {**TILED, "SPLITS": 128, "USE_CUTS": True},
        num_warps=8,
    ),
    variant(
        "finish",
        {
            **(LOGITS | ROWS | PEAKS | SIZES),
            "positions_ptr": "*i32",
            "counts_ptr": "*i16",
            "history_ptr": "*i32",
            "places_ptr": "*i32",
            "thresholds_ptr": "*i32",
            "masses_ptr": "*i64",
            "tokens_ptr": "*i64",
            "failed_ptr": "*i1",
            "history_stride": "i32",
        },
        {**TILED, "SPLITS": 128, "USE_DRAWS": True, "USE_CUTS": True},
        num_warps=8,
    ),
    variant(
        "top",
        LOGITS | ROWS | VOCAB | {"stats_ptr": "*fp32", "best_ptr": "*i64"},
        {"TOP": 20, "BLOCK": 4096},
    ),
    variant(
        "logprob",
        {
            **(LOGITS | ROWS),
            "stats_ptr": "*fp32",
            "best_ptr": "*i64",
            "tokens_ptr": "*i64",
            "logprobs_ptr": "*fp32",
            "top_tokens_ptr": "*i64",
            "top_logprobs_ptr": "*fp32",
            "num_tiles": "i32",
        },
        {"TOP": 20, "BLOCK_TILES": 64, "CANDIDATES": 1024},
    ),
    variant(
        "peak",
        {
            "logits_ptr": "*bf16",
            "logits_stride": "i32:16",
            **SIZES,
            "slots_ptr": "*i32",
            "peaks_ptr": "*fp32",
            "places_ptr": "*i32",
        },
        TILED,
        suffix="-bf16",
    ),
    variant(
        "finish",
        {
            **(LOGITS | ROWS | PEAKS | SIZES),
            "positions_ptr": "*i32",
            "counts_ptr": "*i16",
            "history_ptr": "*i32",
            "places_ptr": "*i32",
            "tokens_ptr": "*i64",
            "failed_ptr": "*i1",
            "history_stride": "i32",
        },
        {
            **TILED,
            "SPLITS": 128,
            "thresholds_ptr": None,
            "masses_ptr": None,
            "USE_DRAWS": False,
            "USE_CUTS": False,
        },
        num_warps=8,
        suffix="-greedy",
    ),
    variant(
        "penalise",
        {**(LOGITS | ROWS | SIZES), "counts_ptr": "*i16"},
        {
            **TILED,
            "bitmask_ptr": None,
            "mask_rows_ptr": None,
            "bitmask_stride": 0,
            "USE_PENALTIES": True,
            "USE_BITMASK": False,
        },
        suffix="-unmasked",
    ),
    variant(
        "mass",
        LOGITS | ROWS | PEAKS | SIZES | {"masses_ptr": "*i64"},
        {**TILED, "SPLITS": 128, "thresholds_ptr": None, "USE_CUTS": False},
        num_warps=8,
        suffix="-uncut",
    ),
]
