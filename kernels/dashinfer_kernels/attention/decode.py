"""Launches decode attention: what is made once a step, grids, and launch parameters."""

import functools
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dashinfer_kernels import dispatch, tuning
from dashinfer_kernels.attention.batch import PagedBatch

_LOG2_E = math.log2(math.e)
# Keys and values of a pipeline stage. A program holds two stages, and three programs fit into a multiprocessor of an H100 or
# H200 (two into an A100's): more bytes in flight than its share of the memory's bandwidth needs.
_STAGE_BYTES = 32 * 1024
# Programs a multiprocessor that the work is dealt to, two rounds of those that fit: more balance lengths that differ, fewer
# leave less to merge.
_PROGRAMS = 6
_MIN_CHUNK_TOKENS = 256
# Batch-invariant mode: pieces of a sequence, by its own length alone.
_FIXED_CHUNK_TOKENS = 1024
_FIXED_PIECES = 32


@dataclass(frozen=True)
class Config:
    """Launch parameters of one shape."""

    block_n: int  # tokens a tile
    num_warps: int
    num_stages: int
    min_chunk: int  # tiles that are not worth splitting
    programs: int = _PROGRAMS  # a multiprocessor


@dataclass(frozen=True)
class Plan:
    """What the layers of a step share: the work items, which are written on the device, and the workspace."""

    config: Config
    block_m: int
    max_items: int
    items: Tensor  # [max_items, 4] int32
    item_starts: Tensor  # [sequences + 1] int32
    partial: Tensor  # [max_items, query_len, num_heads, head_dim] float32
    stats: Tensor  # [max_items, 2, query_len, num_heads] float32
    merge_tile: tuple[int, int]  # work items, columns of the output


def choose_config(head_dim: int, kv_itemsize: int, block_m: int, *, hip: bool = False) -> Config:
    """The heuristic: tiles of `_STAGE_BYTES`; fewer tokens or more warps where registers are short."""
    padded = _power_of_two(head_dim)
    stage_bytes = _STAGE_BYTES if kv_itemsize == 2 else _STAGE_BYTES // 4 if hip and kv_itemsize == 1 else _STAGE_BYTES // 2
    if kv_itemsize == 1 and block_m == 64:
        stage_bytes //= 2
    block_n = max(16, min(128, stage_bytes // (2 * padded * kv_itemsize)))
    return Config(
        block_n=block_n,
        num_warps=8 if block_m == 64 or padded * kv_itemsize >= 1024 else 4,
        num_stages=2 if hip else 4 if kv_itemsize == 1 else 3,
        min_chunk=_MIN_CHUNK_TOKENS // block_n,
    )


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    batch: PagedBatch,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    kv_scales: Tensor | None,
    query_len: int = 1,
    config: Config | None = None,
) -> None:
    """Attention of the batch's leading `num_decodes` sequences, `query_len` tokens each, causal among those.

    Reads nothing from the device, and no host array of the batch. What it derives from the batch stays in `batch.plans`: a
    batch whose tensors are overwritten for the next step needs its plans cleared, unless the launches that made them are
    replayed too, as those of a captured graph are (so: clear them before capturing).

    Args:
        q: [num_decodes * query_len, num_heads, head_dim] float16, bfloat16 or float32; heads and dimensions without gaps.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], the type of `q`, int8 or float8_e4m3fn.
        batch: the step's layout. A sequence of context length 0 is padding; its output is zeros.
        out: [num_decodes * query_len, num_heads * head_dim], the type of `q`, contiguous; written.
        scale, window, softcap, kv_scales: as of `launch.paged_attention`.
        query_len: tokens of each of the sequences.
        config: instead of the tuned one.
    """
    sequences = batch.num_decodes
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    num_heads = q.shape[1]
    assert q.shape[0] == sequences * query_len == out.shape[0]
    assert q.stride()[1:] == (head_dim, 1)
    assert out.is_contiguous()
    assert (kv_scales is None) == (kv_cache.dtype == q.dtype)
    assert block_size & (block_size - 1) == 0
    if sequences == 0:
        return
    kernels = _kernels()
    key = ("decode", q.dtype, kv_cache.dtype, num_heads, num_kv_heads, head_dim, window, query_len, config)
    plan = batch.plans.get(key)
    if plan is None:
        config = config or _config(num_heads, kv_cache, query_len)
        plan = batch.plans[key] = make_plan(q, batch, num_kv_heads, window, query_len, config)
    if kv_cache.dtype == torch.float8_e4m3fn and not _has_float8(q.device):
        kv_cache = kv_cache.view(torch.uint8)

    rows = query_len * num_heads // num_kv_heads
    score_scale = scale * _LOG2_E if softcap is None else scale * 2 * _LOG2_E / softcap
    kernels.attend[(num_kv_heads * -(-rows // plan.block_m), plan.max_items)](
        q_ptr=q,
        kv_ptr=kv_cache,
        kv_scales_ptr=kv_scales,
        tables_ptr=batch.block_tables,
        context_lengths_ptr=batch.context_lengths,
        items_ptr=plan.items,
        item_starts_ptr=plan.item_starts,
        out_ptr=out,
        partial_ptr=plan.partial,
        stats_ptr=plan.stats,
        num_sequences=sequences,
        q_stride=q.stride(0),
        table_stride=batch.block_tables.stride(0),
        score_scale=score_scale,
        softcap=0.0 if softcap is None else softcap * _LOG2_E,
        window=window or 0,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        QUERY_LEN=query_len,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.config.block_n,
        BLOCK_D=_power_of_two(head_dim),
        USE_SCALES=kv_scales is not None,
        USE_SOFTCAP=softcap is not None,
        USE_WINDOW=window is not None,
        USE_PTX=_uses_ptx(q.device),
        num_warps=plan.config.num_warps,
        num_stages=plan.config.num_stages,
    )
    kernels.merge[(sequences * query_len, -(-num_heads * head_dim // plan.merge_tile[1]))](
        partial_ptr=plan.partial,
        stats_ptr=plan.stats,
        item_starts_ptr=plan.item_starts,
        out_ptr=out,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        QUERY_LEN=query_len,
        BLOCK_ITEMS=plan.merge_tile[0],
        BLOCK_COLUMNS=plan.merge_tile[1],
        num_warps=4,
    )


def make_plan(q: Tensor, batch: PagedBatch, num_kv_heads: int, window: int | None, query_len: int, config: Config) -> Plan:
    """Allocate, and launch the kernel that deals the work. Sizes depend on shapes only."""
    sequences, device = batch.num_decodes, q.device
    num_heads, head_dim = q.shape[1:]
    rows = query_len * num_heads // num_kv_heads
    block_m = choose_block_m(rows)
    multiprocessors = _multiprocessors(device)
    if dispatch.deterministic:
        workers, min_chunk = _FIXED_PIECES, max(1, _FIXED_CHUNK_TOKENS // config.block_n)
        longest = batch.block_tables.shape[1] * batch.block_size
        max_items = sequences * max(1, min(_FIXED_PIECES, -(-longest // (min_chunk * config.block_n))))
    else:
        programs = config.programs * multiprocessors
        workers, min_chunk = max(1, programs // (num_kv_heads * -(-rows // block_m))), config.min_chunk
        max_items = workers + sequences
    plan = Plan(
        config=config,
        block_m=block_m,
        max_items=max_items,
        items=torch.empty(max_items, 4, dtype=torch.int32, device=device),
        item_starts=torch.empty(sequences + 1, dtype=torch.int32, device=device),
        partial=torch.empty(max_items, query_len, num_heads, head_dim, dtype=torch.float32, device=device),
        stats=torch.empty(max_items, 2, query_len, num_heads, dtype=torch.float32, device=device),
        merge_tile=choose_merge_tile(sequences * query_len * num_heads * head_dim, multiprocessors),
    )
    _kernels().schedule[(sequences,)](
        context_lengths_ptr=batch.context_lengths,
        items_ptr=plan.items,
        item_starts_ptr=plan.item_starts,
        num_sequences=sequences,
        workers=workers,
        min_chunk=min_chunk,
        window=window or 0,
        QUERY_LEN=query_len,
        BLOCK_N=config.block_n,
        BLOCK_SEQUENCES=_power_of_two(sequences),
        BLOCK_ITEMS=128,
        USE_WINDOW=window is not None,
        USE_OWN_LENGTH=dispatch.deterministic,
        num_warps=4,
    )
    return plan


def choose_block_m(rows: int) -> int:
    """Query rows of a program: what tensor cores take at least, and no more than leaves the accumulator in registers."""
    return max(16, min(64, _power_of_two(rows)))


def choose_merge_tile(elements: int, multiprocessors: int) -> tuple[int, int]:
    """The heuristic: narrow where there is little output, so that a long sequence's many pieces are read by many programs."""
    if dispatch.deterministic:
        return 32, 64
    return (128, 32) if elements <= 4 * multiprocessors * 32 else (16, 256)


def _config(num_heads: int, kv_cache: Tensor, query_len: int) -> Config:
    num_kv_heads, _, head_dim = kv_cache.shape[2:]
    key = (num_heads, num_kv_heads, head_dim, query_len, str(kv_cache.dtype).removeprefix("torch."))
    tuned = tuning.lookup("paged_attention_decode", key)
    if tuned is not None:
        return Config(**tuned)
    block_m = choose_block_m(query_len * num_heads // num_kv_heads)
    return choose_config(head_dim, kv_cache.element_size(), block_m, hip=torch.version.hip is not None)


@functools.cache
def _kernels() -> ModuleType:
    """The module of the kernels; CPU workers never load it, nor Triton."""
    from dashinfer_kernels.attention import kernel_decode

    return kernel_decode


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of the device; under the interpreter, few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def _uses_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _has_float8(device: torch.device) -> bool:
    """Whether Triton converts float8_e4m3fn there."""
    return not _uses_ptx(device) or torch.cuda.get_device_capability(device) >= (8, 9)


def _power_of_two(count: int) -> int:
    """The least that is not less than `count`."""
    return 1 << (count - 1).bit_length()
