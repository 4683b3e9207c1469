"""Kernels of log-probabilities: the likeliest tokens of each tile, then of the row."""

import triton
import triton.language as tl

from dashinfer_kernels.sampling.kernel_common import LEAST_INT64, LOGPROBS, VARYING, is_finite


@triton.jit
def _ordered(x):
    """float32 to int32 of the same order; 0 and -0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(**VARYING)
def top_kernel(
    logits_ptr,  # [rows, vocab] as the model gave them
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    stats_ptr,  # [rows, tiles, 2] float32: each tile's greatest logit, and the sum of exponentials relative to it
    best_ptr,  # [rows, tiles, TOP] int64: its greatest logits (upper half) with their tokens, lowest first among equals
    vocab,
    logits_stride,
    params_stride,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(params_ptr + slot * params_stride + LOGPROBS) < 0:
        return
    tile = row * tl.num_programs(1) + tl.program_id(1)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * logits_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, 0)
    base = tl.where(is_finite(peak), peak, 0.0)
    tl.store(stats_ptr + 2 * tile, peak)
    tl.store(stats_ptr + 2 * tile + 1, tl.sum(tl.exp(x - base), 0))
    if TOP > 0:
        packed = (_ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
        packed = tl.where(at < vocab, packed, LEAST_INT64)
        for rank in range(TOP):
            best = tl.max(packed, 0)
            tl.store(best_ptr + tile * TOP + rank, best)
            packed = tl.where(packed == best, LEAST_INT64, packed)


@triton.jit(**VARYING)
def logprob_kernel(
    logits_ptr,  # [rows, vocab] as the model gave them
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    stats_ptr,  # [rows, tiles, 2]
    best_ptr,  # [rows, tiles, TOP]
    tokens_ptr,  # [rows]
    logprobs_ptr,  # [rows] float32
    top_tokens_ptr,  # [rows, TOP] int64
    top_logprobs_ptr,  # [rows, TOP] float32
    logits_stride,
    params_stride,
    num_tiles,
    TOP: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    if tl.load(params_ptr + slot * params_stride + LOGPROBS) < 0:
        return
    tiles = tl.arange(0, BLOCK_TILES)
    stats_ptr += 2 * (row * num_tiles + tiles)
    peaks = tl.load(stats_ptr, mask=tiles < num_tiles, other=float("-inf"))
    sums = tl.load(stats_ptr + 1, mask=tiles < num_tiles, other=0.0)
    peak = tl.max(peaks, 0)
    total = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak), 0))
    token = tl.load(tokens_ptr + row)
    tl.store(logprobs_ptr + row, tl.load(logits_ptr + row * logits_stride + token).to(tl.float32) - total)
    if TOP > 0:
        at = tl.arange(0, CANDIDATES)
        candidates = num_tiles * TOP
        packed = tl.load(best_ptr + row * candidates + at, mask=at < candidates, other=LEAST_INT64)
        for rank in range(TOP):
            best = tl.max(packed, 0)
            bits = (best >> 32).to(tl.int32)
            value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            tl.store(top_tokens_ptr + row * TOP + rank, 0x7FFFFFFF - (best & 0x7FFFFFFF))
            tl.store(top_logprobs_ptr + row * TOP + rank, value - total)
            packed = tl.where(packed == best, LEAST_INT64, packed)
