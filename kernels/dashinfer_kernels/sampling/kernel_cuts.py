"""Kernels that find where top_k and top_p cut a row: count, bracket, gather, search. Grids are as in kernel_draw.py."""

import triton
import triton.language as tl

from dashinfer_kernels.sampling.kernel_common import (
    BIN_BITS,
    BIN_KEYS,
    BINS,
    FIRST_KEY,
    LEAST_KEY,
    P_ONE,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    VARYING,
    fraction_of,
    is_cut,
    is_finite,
    load_float,
    lower_key,
    row_peak,
    to_integers,
    weigh,
)


@triton.jit(**VARYING)
def histogram_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    peaks_ptr,  # [rows, splits]
    bins_ptr,  # [rows, BINS] int32, zeros before
    sums_ptr,  # [rows] int64, zeros before
    vocab,
    logits_stride,
    params_stride,
    num_splits,
    tiles,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where top_k or top_p is on: a count of the tokens in each bin, and the sum of all weights."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    params_ptr += slot * params_stride
    if not is_cut(params_ptr):
        return
    peak = row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not is_finite(peak):
        return
    logits_ptr += row * logits_stride
    temperature = load_float(params_ptr, TEMPERATURE)
    counts = tl.zeros((BINS,), tl.int32)
    sums = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weights = weigh(x, peak, temperature)
        keys = weights.to(tl.int32, bitcast=True)
        live = keys >= LEAST_KEY
        counts += tl.histogram(tl.maximum(keys - FIRST_KEY, 0) >> BIN_BITS, BINS, mask=live)
        sums += to_integers(weights)
    tl.atomic_add(bins_ptr + row * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")
    tl.atomic_add(sums_ptr + row, tl.sum(sums, 0), sem="relaxed")


@triton.jit(**VARYING)
def bracket_kernel(
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    peaks_ptr,  # [rows, splits]
    bins_ptr,  # [rows, BINS]
    sums_ptr,  # [rows] the sum of all weights
    brackets_ptr,  # [rows, 2] int32
    params_stride,
    num_splits,
    SPLITS: tl.constexpr,
):
    """The least and, exclusive, the greatest key between which the threshold must lie, judging by the histogram."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    params_ptr += slot * params_stride
    if not is_cut(params_ptr):
        return
    if not is_finite(row_peak(peaks_ptr, row, num_splits, SPLITS)):
        return
    top_k = tl.load(params_ptr + TOP_K)
    bins = BINS - 1 - tl.arange(0, BINS)  # the greatest weights first
    counts = tl.load(bins_ptr + row * BINS + bins)
    if top_k > 0:
        before = tl.sum((tl.cumsum(counts, 0) < top_k).to(tl.int32), 0)  # bins that leave too few
        low = tl.maximum(BINS - 1 - before, 0)
        high = BINS - 1
    else:
        # a bin's sum of weights lies between what its bounds allow
        lower = lower_key(bins)
        least = to_integers(tl.minimum(lower.to(tl.float32, bitcast=True), 1.0))
        greatest = to_integers(tl.minimum(((bins << BIN_BITS) + (FIRST_KEY + BIN_KEYS)).to(tl.float32, bitcast=True), 1.0))
        target = tl.maximum(fraction_of(tl.load(sums_ptr + row), tl.load(params_ptr + TOP_P).to(tl.int64), 30), 1)
        before = tl.sum((tl.cumsum(counts * least, 0) < target).to(tl.int32), 0)
        low = tl.maximum(BINS - 1 - before, 0)
        high = BINS - 1 - tl.sum((tl.cumsum(counts * greatest, 0) < target).to(tl.int32), 0)
    tl.store(brackets_ptr + 2 * row, lower_key(low))
    tl.store(brackets_ptr + 2 * row + 1, ((high + 1) << BIN_BITS) + FIRST_KEY)


@triton.jit(**VARYING)
def gather_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    peaks_ptr,  # [rows, splits]
    brackets_ptr,  # [rows, 2]
    found_ptr,  # [rows] int64, zeros before; how many keys the bracket has
    above_ptr,  # [rows] int64, zeros before; the sum of weights above the bracket
    keys_ptr,  # [rows, CAPACITY] int32; in no order
    vocab,
    logits_stride,
    params_stride,
    num_splits,
    tiles,
    CAPACITY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    params_ptr += slot * params_stride
    if not is_cut(params_ptr):
        return
    peak = row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not is_finite(peak):
        return
    logits_ptr += row * logits_stride
    temperature = load_float(params_ptr, TEMPERATURE)
    low = tl.load(brackets_ptr + 2 * row)
    high = tl.load(brackets_ptr + 2 * row + 1)
    above = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weights = weigh(x, peak, temperature)
        keys = weights.to(tl.int32, bitcast=True)
        above += tl.where(keys >= high, to_integers(weights), 0)
        member = ((keys >= low) & (keys < high)).to(tl.int32)
        count = tl.sum(member, 0)
        if count > 0:
            start = tl.atomic_add(found_ptr + row, count.to(tl.int64), sem="relaxed")
            to = start + tl.cumsum(member, 0) - 1
            tl.store(keys_ptr + row * CAPACITY + to, keys, mask=(member > 0) & (to < CAPACITY))
    total = tl.sum(above, 0)
    if total > 0:
        tl.atomic_add(above_ptr + row, total, sem="relaxed")


@triton.jit
def _at_least(key, high, keys, found, logits_ptr, vocab, peak, temperature, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys are in [key, high), and the sum of their weights.

    From the gathered keys or, where those were too many, from the whole row.
    """
    if found <= CAPACITY:
        chosen = keys >= key
        count = tl.sum(chosen.to(tl.int32), 0)
        mass = tl.sum(tl.where(chosen, to_integers(keys.to(tl.float32, bitcast=True)), 0), 0)
    else:
        counts = tl.zeros((BLOCK,), tl.int32)
        sums = tl.zeros((BLOCK,), tl.int64)
        start = 0
        while start < vocab:
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            weights = weigh(x, peak, temperature)
            every = weights.to(tl.int32, bitcast=True)
            chosen = (every >= key) & (every < high)
            counts += chosen.to(tl.int32)
            sums += tl.where(chosen, to_integers(weights), 0)
            start += BLOCK
        count = tl.sum(counts, 0)
        mass = tl.sum(sums, 0)
    return count, mass


@triton.jit(**VARYING)
def threshold_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    peaks_ptr,  # [rows, splits]
    brackets_ptr,  # [rows, 2]
    found_ptr,  # [rows]
    above_ptr,  # [rows]
    sums_ptr,  # [rows] the sum of all weights
    keys_ptr,  # [rows, CAPACITY]
    thresholds_ptr,  # [rows] int32, where top_k or top_p is on
    vocab,
    logits_stride,
    params_stride,
    num_splits,
    CAPACITY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The least key that top_k and top_p leave: the greatest one at or above which there is enough."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    params_ptr += slot * params_stride
    if not is_cut(params_ptr):
        return
    peak = row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not is_finite(peak):
        return
    logits_ptr += row * logits_stride
    temperature = load_float(params_ptr, TEMPERATURE)
    top_k = tl.load(params_ptr + TOP_K)
    top_p = tl.load(params_ptr + TOP_P).to(tl.int64)
    low = tl.load(brackets_ptr + 2 * row)
    bound = tl.load(brackets_ptr + 2 * row + 1)
    above = tl.load(above_ptr + row)
    found = tl.load(found_ptr + row)
    at = tl.arange(0, CAPACITY)
    keys = tl.load(keys_ptr + row * CAPACITY + at, mask=at < found, other=0)
    sum_kept = tl.load(sums_ptr + row)
    if top_k > 0:
        high = bound
        while high - low > 1:
            middle = low + (high - low) // 2
            count, _ = _at_least(middle, bound, keys, found, logits_ptr, vocab, peak, temperature, CAPACITY, BLOCK)
            if count >= top_k:
                low = middle
            else:
                high = middle
        _, sum_kept = _at_least(low, bound, keys, found, logits_ptr, vocab, peak, temperature, CAPACITY, BLOCK)
    if top_p < P_ONE:
        target = tl.maximum(fraction_of(sum_kept, top_p, 30), 1)
        high = bound
        while high - low > 1:
            middle = low + (high - low) // 2
            _, mass = _at_least(middle, bound, keys, found, logits_ptr, vocab, peak, temperature, CAPACITY, BLOCK)
            if above + mass >= target:
                low = middle
            else:
                high = middle
    tl.store(thresholds_ptr + row, low)
