"""Sampling kernels. A step's sequence of them is in launch.py; what they compute is defined in reference.py.

Most run a grid of rows and splits: a split is `tiles` tiles of BLOCK tokens of a row. Programs whose row does not need
a kernel return at once. Keys are the bits of float32 weights, which order as the weights do; a histogram has 16 bins to each
power of two. Sums over splits are of integers, so neither their number nor their order changes a token.
"""

import triton
import triton.language as tl

from dashinfer_kernels.sampling.state import MAX_COUNT, TOP_P_ONE, Field

TEMPERATURE = tl.constexpr(int(Field.TEMPERATURE))
TOP_K = tl.constexpr(int(Field.TOP_K))
TOP_P = tl.constexpr(int(Field.TOP_P))
MIN_P = tl.constexpr(int(Field.MIN_P))
PRESENCE_PENALTY = tl.constexpr(int(Field.PRESENCE_PENALTY))
FREQUENCY_PENALTY = tl.constexpr(int(Field.FREQUENCY_PENALTY))
REPETITION_PENALTY = tl.constexpr(int(Field.REPETITION_PENALTY))
PENALISED = tl.constexpr(int(Field.PENALISED))
SEED_LOW = tl.constexpr(int(Field.SEED_LOW))
SEED_HIGH = tl.constexpr(int(Field.SEED_HIGH))
STOPS_FROM = tl.constexpr(int(Field.STOPS_FROM))
NUM_STOPS = tl.constexpr(int(Field.NUM_STOPS))
NUM_BIASES = tl.constexpr(int(Field.NUM_BIASES))
LOGPROBS = tl.constexpr(int(Field.LOGPROBS))
END = tl.constexpr(int(Field.END))
COUNT_BITS = tl.constexpr(MAX_COUNT)
P_ONE = tl.constexpr(TOP_P_ONE)

GREATEST_FLOAT = tl.constexpr(3.4028234663852886e38)
WEIGHT_ONE = tl.constexpr(2.0**40)
LEAST_KEY = tl.constexpr((127 - 40) << 23)  # of the weight 2^-40, the least that is not 0 as an integer
BIN_BITS = tl.constexpr(19)  # low bits of a key that its bin does not tell
BIN_KEYS = tl.constexpr(1 << 19)
FIRST_KEY = tl.constexpr(((127 - 32) << 23) + (1 << 19))  # of bin 0, which also has all from LEAST_KEY; that of 1 has bin 511
BINS = tl.constexpr(512)
LEAST_INT64 = tl.constexpr(-(2**63))

# What differs from step to step does not compile a kernel again: rows of one tensor of numbers a row, aligned or not.
_VARYING = {
    "do_not_specialize": ["num_splits", "tiles"],
    "do_not_specialize_on_alignment": ["slots_ptr", "positions_ptr", "found_ptr", "above_ptr"],
}


@triton.jit
def _float(params_ptr, field: tl.constexpr):
    return tl.load(params_ptr + field).to(tl.float32, bitcast=True)


@triton.jit
def _finite(x):
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def _row_peak(peaks_ptr, row, num_splits, SPLITS: tl.constexpr):
    """A row's greatest logit; NaN where it has one."""
    splits = tl.arange(0, SPLITS)
    peaks = tl.load(peaks_ptr + row * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
    return _max_or_nan(peaks)


@triton.jit
def _max_or_nan(x):
    bad = tl.max((x != x).to(tl.int32), 0)
    greatest = tl.max(tl.where(x != x, float("inf"), x), 0)
    return tl.where(bad > 0, float("nan"), greatest)


@triton.jit
def _weigh(x, peak, temperature):
    """Weights of logits, float32 in [0, 1]."""
    return tl.minimum(tl.exp(tl.div_rn(x - peak, tl.zeros_like(x) + temperature)), 1.0)


@triton.jit
def _integers(weights):
    return (weights * WEIGHT_ONE).to(tl.int64)


@triton.jit
def _fraction(total, numerator, BITS: tl.constexpr):
    return (total >> BITS) * numerator + (((total & ((1 << BITS) - 1)) * numerator) >> BITS)


@triton.jit
def _lower_key(bins):
    return tl.where(bins == 0, LEAST_KEY, (bins << BIN_BITS) + FIRST_KEY)


@triton.jit
def _is_cut(params_ptr):
    """Whether top_k or top_p is on for a row that draws."""
    on = (tl.load(params_ptr + TOP_K) > 0) | (tl.load(params_ptr + TOP_P) < P_ONE)
    return on & (_float(params_ptr, TEMPERATURE) > 0)


@triton.jit(**_VARYING)
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


@triton.jit(**_VARYING)
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
    repetition = _float(params_ptr, REPETITION_PENALTY)
    presence = _float(params_ptr, PRESENCE_PENALTY)
    frequency = _float(params_ptr, FREQUENCY_PENALTY)
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


@triton.jit(**_VARYING)
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
    peak = _max_or_nan(best)
    split = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(peaks_ptr + split, peak)
    tl.store(places_ptr + split, tl.min(tl.where(best == peak, place, vocab), 0))


@triton.jit(**_VARYING)
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
    if not _is_cut(params_ptr):
        return
    peak = _row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not _finite(peak):
        return
    logits_ptr += row * logits_stride
    temperature = _float(params_ptr, TEMPERATURE)
    counts = tl.zeros((BINS,), tl.int32)
    sums = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weights = _weigh(x, peak, temperature)
        keys = weights.to(tl.int32, bitcast=True)
        live = keys >= LEAST_KEY
        counts += tl.histogram(tl.maximum(keys - FIRST_KEY, 0) >> BIN_BITS, BINS, mask=live)
        sums += _integers(weights)
    tl.atomic_add(bins_ptr + row * BINS + tl.arange(0, BINS), counts, mask=counts > 0, sem="relaxed")
    tl.atomic_add(sums_ptr + row, tl.sum(sums, 0), sem="relaxed")


@triton.jit(**_VARYING)
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
    if not _is_cut(params_ptr):
        return
    if not _finite(_row_peak(peaks_ptr, row, num_splits, SPLITS)):
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
        lower = _lower_key(bins)
        least = _integers(tl.minimum(lower.to(tl.float32, bitcast=True), 1.0))
        greatest = _integers(tl.minimum(((bins << BIN_BITS) + (FIRST_KEY + BIN_KEYS)).to(tl.float32, bitcast=True), 1.0))
        target = tl.maximum(_fraction(tl.load(sums_ptr + row), tl.load(params_ptr + TOP_P).to(tl.int64), 30), 1)
        before = tl.sum((tl.cumsum(counts * least, 0) < target).to(tl.int32), 0)
        low = tl.maximum(BINS - 1 - before, 0)
        high = BINS - 1 - tl.sum((tl.cumsum(counts * greatest, 0) < target).to(tl.int32), 0)
    tl.store(brackets_ptr + 2 * row, _lower_key(low))
    tl.store(brackets_ptr + 2 * row + 1, ((high + 1) << BIN_BITS) + FIRST_KEY)


@triton.jit(**_VARYING)
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
    if not _is_cut(params_ptr):
        return
    peak = _row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not _finite(peak):
        return
    logits_ptr += row * logits_stride
    temperature = _float(params_ptr, TEMPERATURE)
    low = tl.load(brackets_ptr + 2 * row)
    high = tl.load(brackets_ptr + 2 * row + 1)
    above = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weights = _weigh(x, peak, temperature)
        keys = weights.to(tl.int32, bitcast=True)
        above += tl.where(keys >= high, _integers(weights), 0)
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
        mass = tl.sum(tl.where(chosen, _integers(keys.to(tl.float32, bitcast=True)), 0), 0)
    else:
        counts = tl.zeros((BLOCK,), tl.int32)
        sums = tl.zeros((BLOCK,), tl.int64)
        start = 0
        while start < vocab:
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
            weights = _weigh(x, peak, temperature)
            every = weights.to(tl.int32, bitcast=True)
            chosen = (every >= key) & (every < high)
            counts += chosen.to(tl.int32)
            sums += tl.where(chosen, _integers(weights), 0)
            start += BLOCK
        count = tl.sum(counts, 0)
        mass = tl.sum(sums, 0)
    return count, mass


@triton.jit(**_VARYING)
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
    if not _is_cut(params_ptr):
        return
    peak = _row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not _finite(peak):
        return
    logits_ptr += row * logits_stride
    temperature = _float(params_ptr, TEMPERATURE)
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
        target = tl.maximum(_fraction(sum_kept, top_p, 30), 1)
        high = bound
        while high - low > 1:
            middle = low + (high - low) // 2
            _, mass = _at_least(middle, bound, keys, found, logits_ptr, vocab, peak, temperature, CAPACITY, BLOCK)
            if above + mass >= target:
                low = middle
            else:
                high = middle
    tl.store(thresholds_ptr + row, low)


@triton.jit
def _least_key(params_ptr, thresholds_ptr, row, USE_CUTS: tl.constexpr):
    least = tl.load(params_ptr + MIN_P)
    if USE_CUTS:  # noqa: SIM102
        if _is_cut(params_ptr):
            least = tl.maximum(least, tl.load(thresholds_ptr + row))
    return least


@triton.jit(**_VARYING)
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
    temperature = _float(params_ptr, TEMPERATURE)
    if temperature == 0:
        return
    peak = _row_peak(peaks_ptr, row, num_splits, SPLITS)
    if not _finite(peak):
        return
    logits_ptr += row * logits_stride
    least = _least_key(params_ptr, thresholds_ptr, row, USE_CUTS)
    sums = tl.zeros((BLOCK,), tl.int64)
    for tile in range(tiles):
        at = (tl.program_id(1) * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        weights = _weigh(x, peak, temperature)
        sums += tl.where(weights.to(tl.int32, bitcast=True) >= least, _integers(weights), 0)
    tl.store(masses_ptr + row * num_splits + tl.program_id(1), tl.sum(sums, 0))


@triton.jit(**_VARYING)
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
        peak = _max_or_nan(peaks)
        if _finite(peak):
            places = tl.load(places_ptr + row * num_splits + splits, mask=inside, other=0)
            token = tl.min(tl.where(peaks == peak, places, vocab), 0)
            if USE_DRAWS:
                temperature = _float(params_ptr, TEMPERATURE)
                if temperature > 0:
                    masses = tl.load(masses_ptr + row * num_splits + splits, mask=inside, other=0)
                    low = tl.load(params_ptr + SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
                    seed = (tl.load(params_ptr + SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
                    word, _, _, _ = tl.philox(seed, position, 0, 0, 0)
                    target = _fraction(tl.sum(masses, 0), (word >> 1).to(tl.int64), 31)
                    before = tl.cumsum(masses, 0) <= target
                    split = tl.sum(before.to(tl.int32), 0)
                    rest = target - tl.sum(tl.where(before, masses, 0), 0)
                    least = _least_key(params_ptr, thresholds_ptr, row, USE_CUTS)
                    token = split * tiles * BLOCK
                    passed = tl.zeros((), tl.int64)
                    for tile in range(tiles):
                        at = (split * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
                        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
                        weights = _weigh(x, peak, temperature)
                        kept = tl.where(weights.to(tl.int32, bitcast=True) >= least, _integers(weights), 0)
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


@triton.jit
def _ordered(x):
    """float32 to int32 of the same order; 0 and -0 are equal."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(**_VARYING)
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
    base = tl.where(_finite(peak), peak, 0.0)
    tl.store(stats_ptr + 2 * tile, peak)
    tl.store(stats_ptr + 2 * tile + 1, tl.sum(tl.exp(x - base), 0))
    if TOP > 0:
        packed = (_ordered(x).to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
        packed = tl.where(at < vocab, packed, LEAST_INT64)
        for rank in range(TOP):
            best = tl.max(packed, 0)
            tl.store(best_ptr + tile * TOP + rank, best)
            packed = tl.where(packed == best, LEAST_INT64, packed)


@triton.jit(**_VARYING)
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
