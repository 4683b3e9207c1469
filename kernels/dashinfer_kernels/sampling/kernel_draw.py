"""Sampling kernels: edits, peaks, masses, and the draw. A step's sequence of kernels is in launch.py.

Most run a grid of rows and splits: a split is `tiles` tiles of BLOCK tokens of a row. Programs whose row does not need
a kernel return at once. Sums over splits are of integers, so neither their number nor their order changes a token.
"""

import triton
import triton.language as tl

from dashinfer_kernels.sampling.kernel_common import (
    COUNT_BITS,
    END,
    FREQUENCY_PENALTY,
    GREATEST_FLOAT,
    MIN_P,
    NUM_BIASES,
    NUM_STOPS,
    PENALISED,
    PRESENCE_PENALTY,
    REPETITION_PENALTY,
    SEED_HIGH,
    SEED_LOW,
    STOPS_FROM,
    TEMPERATURE,
    VARYING,
    fraction_of,
    is_cut,
    is_finite,
    load_float,
    max_or_nan,
    row_peak,
    to_integers,
    weigh,
)


@triton.jit(**VARYING)
def edit_kernel(
    logits_ptr,  # [rows, vocab] float32, in place
    slots_ptr,  # [rows]
    positions_ptr,  # [rows]
    params_ptr,  # [slots, words]
    logits_stride,
    params_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    logits_ptr += row * logits_stride
    params_ptr += slot * params_stride
    num_stops = tl.load(params_ptr + NUM_STOPS)
    num_biases = tl.load(params_ptr + NUM_BIASES)
    biases_ptr = params_ptr + END + num_stops
    start = 0
    while start < num_biases:
        at = start + tl.arange(0, BLOCK)
        inside = at < num_biases
        ids = tl.load(biases_ptr + at, mask=inside, other=0)
        bias = tl.load(biases_ptr + num_biases + at, mask=inside, other=0).to(tl.float32, bitcast=True)
        x = tl.load(logits_ptr + ids, mask=inside, other=0.0)
        tl.store(logits_ptr + ids, x + bias, mask=inside)
        start += BLOCK
    tl.debug_barrier()  # a token may be in both lists
    if tl.load(positions_ptr + row) < tl.load(params_ptr + STOPS_FROM):
        start = 0
        while start < num_stops:
            at = start + tl.arange(0, BLOCK)
            ids = tl.load(params_ptr + END + at, mask=at < num_stops, other=0)
            tl.store(logits_ptr + ids, float("-inf"), mask=at < num_stops)
            start += BLOCK


@triton.jit(**VARYING)
def penalise_kernel(
    logits_ptr,  # [rows, vocab] float32, in place
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    counts_ptr,  # [slots, vocab] int16
    bitmask_ptr,  # [masks, ceil(vocab / 32)] int32
    mask_rows_ptr,  # [rows]
    vocab,
    logits_stride,
    params_stride,
    bitmask_stride,
    tiles,
    USE_PENALTIES: tl.constexpr,
    USE_BITMASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    logits_ptr += row * logits_stride
    params_ptr += slot * params_stride
    counts_ptr += slot * vocab
    penalised = 0  # or 1
    if USE_PENALTIES:
        penalised = tl.load(params_ptr + PENALISED)
    mask_row = tl.full((), -1, tl.int64)
    if USE_BITMASK:
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    if (penalised == 0) & (mask_row < 0):
        return
    masked = tl.where(mask_row >= 0, vocab, 0)  # tokens that a grammar speaks of
    repetition = load_float(params_ptr, REPETITION_PENALTY)
    presence = load_float(params_ptr, PRESENCE_PENALTY)
    frequency = load_float(params_ptr, FREQUENCY_PENALTY)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = at < vocab
        x = tl.load(logits_ptr + at, mask=inside, other=0.0)
        if USE_PENALTIES:
            seen = tl.load(counts_ptr + at, mask=at < penalised * vocab, other=0).to(tl.int32)
            count = seen & COUNT_BITS
            factor = tl.zeros_like(x) + repetition
            y = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
            y = tl.where(y > GREATEST_FLOAT, GREATEST_FLOAT, y)
            x = tl.where(seen != 0, y, x)
            x = tl.where(count > 0, x - (presence + frequency * count.to(tl.float32)), x)
        if USE_BITMASK:
            words = tl.load(bitmask_ptr + mask_row * bitmask_stride + (at >> 5), mask=at < masked, other=-1)
            x = tl.where(((words >> (at & 31)) & 1) == 0, float("-inf"), x)
        tl.store(logits_ptr + at, x, mask=inside)


@triton.jit(**VARYING)
def peak_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    peaks_ptr,  # [rows, splits] float32
    places_ptr,  # [rows, splits] int32
    vocab,
    logits_stride,
    tiles,
    BLOCK: tl.constexpr,
):
    """Each split's greatest logit, NaN where it has one, and the lowest token that has it."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(slots_ptr + row) < 0:
        return
    logits_ptr += row * logits_stride
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    for tile in tl.range(tiles, disable_licm=True):  # else 16-bit logits cost a register too many
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        better = (x > best) | (x != x)
        best = tl.where(better, x, best)
        place = tl.where(better, at, place)
    peak = max_or_nan(best)
    split = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks_ptr + split, peak)
    tl.store(places_ptr + split, tl.min(tl.where(best == peak, place, vocab), 0))


@triton.jit
def _least_key(params_ptr, thresholds_ptr, row, USE_CUTS: tl.constexpr):
    least = tl.load(params_ptr + MIN_P)
    if USE_CUTS:  # noqa: SIM102
        if is_cut(params_ptr):
            least = tl.maximum(least, tl.load(thresholds_ptr + row))
    return least


@triton.jit(**VARYING)
def mass_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    params_ptr,  # [slots, words]
    peaks_ptr,  # [rows, splits]
    thresholds_ptr,  # [rows]
    masses_ptr,  # [rows, splits] int64
    vocab,
    logits_stride,
    params_stride,
    num_splits,
    tiles,
    USE_CUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each split's sum of the weights that stay, for rows that draw."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    params_ptr += slot * params_stride
    temperature = load_float(params_ptr, TEMPERATURE)
    if temperature == 0:
        return
    peak = row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not is_finite(peak):
        return
    logits_ptr += row * logits_stride
    least = _least_key(params_ptr, thresholds_ptr, row, USE_CUTS)
    sums = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weights = weigh(x, peak, temperature)
        sums += tl.where(weights.to(tl.int32, bitcast=True) >= least, to_integers(weights), 0)
    tl.store(masses_ptr + row * num_splits + tl.program_id(1), tl.sum(sums, 0))


@triton.jit(**VARYING)
def finish_kernel(
    logits_ptr,  # [rows, vocab]
    slots_ptr,  # [rows]
    positions_ptr,  # [rows]
    params_ptr,  # [slots, words]
    counts_ptr,  # [slots, vocab] int16, in place
    history_ptr,  # [slots, positions] int32, in place
    peaks_ptr,  # [rows, splits]
    places_ptr,  # [rows, splits]
    thresholds_ptr,  # [rows]
    masses_ptr,  # [rows, splits]
    tokens_ptr,  # [rows] int64
    failed_ptr,  # [rows] bool
    vocab,
    logits_stride,
    params_stride,
    history_stride,
    num_splits,
    tiles,
    USE_DRAWS: tl.constexpr,
    USE_CUTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The token of a row, recorded in its slot."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    token = tl.zeros((), tl.int32)
    failed = slot < slot
    if slot >= 0:
        logits_ptr += row * logits_stride
        params_ptr += slot * params_stride
        position = tl.load(positions_ptr + row)
        splits = tl.arange(0, SPLITS)
        inside = splits < num_splits
        peaks = tl.load(peaks_ptr + row * num_splits + splits, mask=inside, other=float("-inf"))
        peak = max_or_nan(peaks)
        if is_finite(peak):
            places = tl.load(places_ptr + row * num_splits + splits, mask=inside, other=0)
            token = tl.min(tl.where(peaks == peak, places, vocab), 0)
            if USE_DRAWS:
                temperature = load_float(params_ptr, TEMPERATURE)
                if temperature > 0:
                    masses = tl.load(masses_ptr + row * num_splits + splits, mask=inside, other=0)
                    low = tl.load(params_ptr + SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
                    seed = (tl.load(params_ptr + SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
                    word, _, _, _ = tl.philox(seed, position, 0, 0, 0)
                    target = fraction_of(tl.sum(masses, 0), (word >> 1).to(tl.int64), 31)
                    before = tl.cumsum(masses, 0) <= target
                    split = tl.sum(before.to(tl.int32), 0)
                    rest = target - tl.sum(tl.where(before, masses, 0), 0)
                    least = _least_key(params_ptr, thresholds_ptr, row, USE_CUTS)
                    token = split * tiles * BLOCK
                    passed = tl.zeros((), tl.int64)
                    for tile in range(tiles):
                        at = (split * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
                        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
                        weights = weigh(x, peak, temperature)
                        kept = tl.where(weights.to(tl.int32, bitcast=True) >= least, to_integers(weights), 0)
                        token += tl.sum((passed + tl.cumsum(kept, 0) <= rest).to(tl.int32), 0)
                        passed += tl.sum(kept, 0)
            tl.store(history_ptr + slot * history_stride + position, token)
            if tl.load(params_ptr + PENALISED) > 0:
                count = tl.load(counts_ptr + slot * vocab + token)
                more = (count & COUNT_BITS) != COUNT_BITS
                tl.store(counts_ptr + slot * vocab + token, count + more.to(tl.int16))
        else:
            failed = slot >= 0
    tl.store(tokens_ptr + row, token.to(tl.int64))
    tl.store(failed_ptr + row, failed)
