"""What sampling kernels share: constants, and the arithmetic of weights and keys that reference.py defines.

Keys are the bits of float32 weights, which order as the weights do; a histogram has 16 bins to each power of two.
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
VARYING = {
    "do_not_specialize": ["num_splits", "tiles"],
    "do_not_specialize_on_alignment": ["slots_ptr", "positions_ptr", "found_ptr", "above_ptr"],
}


@triton.jit
def load_float(params_ptr, field: tl.constexpr):
    return tl.load(params_ptr + field).to(tl.float32, bitcast=True)


@triton.jit
def is_finite(x):
    return (x > float("-inf")) & (x < float("inf"))


@triton.jit
def row_peak(peaks_ptr, row, num_splits, SPLITS: tl.constexpr):
    """A row's greatest logit; NaN where it has one."""
    splits = tl.arange(0, SPLITS)
    peaks = tl.load(peaks_ptr + row * num_splits + splits, mask=splits < num_splits, other=float("-inf"))
    return max_or_nan(peaks)


@triton.jit
def max_or_nan(x):
    bad = tl.max((x != x).to(tl.int32), 0)
    greatest = tl.max(tl.where(x != x, float("inf"), x), 0)
    return tl.where(bad > 0, float("nan"), greatest)


@triton.jit
def weigh(x, peak, temperature):
    """Weights of logits, float32 in [0, 1]."""
    return tl.minimum(tl.exp(tl.div_rn(x - peak, tl.zeros_like(x) + temperature)), 1.0)


@triton.jit
def to_integers(weights):
    return (weights * WEIGHT_ONE).to(tl.int64)


@triton.jit
def fraction_of(total, numerator, BITS: tl.constexpr):
    return (total >> BITS) * numerator + (((total & ((1 << BITS) - 1)) * numerator) >> BITS)


@triton.jit
def lower_key(bins):
    return tl.where(bins == 0, LEAST_KEY, (bins << BIN_BITS) + FIRST_KEY)


@triton.jit
def is_cut(params_ptr):
    """Whether top_k or top_p is on for a row that draws."""
    on = (tl.load(params_ptr + TOP_K) > 0) | (tl.load(params_ptr + TOP_P) < P_ONE)
    return on & (load_float(params_ptr, TEMPERATURE) > 0)
