"""Definition of sampling.

A row's token is a function of its own logits, parameters, seed and position. With `peak` the greatest of its adjusted logits,
a token's weight is `exp((logit - peak) / temperature)` in float32, and as an integer, for sums, that times 2^40 rounded down.
Integer sums do not depend on their order, so any split of a row over programs gives the same token. Cuts are thresholds on
weights, so ties are kept together. The draw is a 31-bit fraction of the sum of the kept weights, looked up in the order of
token ids.

The fraction comes from Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405): the key is the seed, the counter the
position, and the first word's upper 31 bits are taken.
"""

import numpy as np
import torch
from torch import Tensor

from dashinfer_kernels.sampling.state import MAX_COUNT, TOP_P_ONE, Field, Sampled, SamplingBatch, SamplingState

WEIGHT_BITS = 40
DRAW_BITS = 31

# [256, 8]: what a logit may be at most by its bit in a byte of a mask
_GREATEST = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
_GREATEST = _GREATEST.astype(np.float32)


def philox(seed: np.ndarray, position: np.ndarray) -> np.ndarray:
    """[rows] int64 each -> the first word of Philox4x32-10, [rows] uint64 below 2^32."""
    word, upper = np.uint64(2**32 - 1), np.uint64(32)
    k0, k1 = seed.view(np.uint64) & word, seed.view(np.uint64) >> upper
    c0 = position.view(np.uint64) & word
    c1 = c2 = c3 = np.zeros_like(c0)
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = second >> upper ^ c1 ^ k0, second & word, first >> upper ^ c3 ^ k1, first & word
        k0, k1 = k0 + np.uint64(0x9E3779B9) & word, k1 + np.uint64(0xBB67AE85) & word
    return c0


def fraction(total: Tensor, numerator: Tensor, bits: int) -> Tensor:
    """`total * numerator / 2^bits` rounded down, int64; total below 2^60, numerator up to 2^bits, bits up to 31."""
    return (total >> bits) * numerator + (((total & (2**bits - 1)) * numerator) >> bits)


def sample(logits: Tensor, state: SamplingState, batch: SamplingBatch) -> Sampled:
    """As the public function; everything is in host memory."""
    slots = batch.slots.tolist()
    rows = [row for row, slot in enumerate(slots) if slot >= 0]
    raw = logits.clone()
    tokens = torch.zeros(len(slots), dtype=torch.int64, device=logits.device)
    failed = torch.zeros(len(slots), dtype=torch.bool, device=logits.device)
    adjusted = mask(adjust(logits.float(), state, batch), batch)
    for row in rows:
        line, params = adjusted[row], state.params[slots[row]]
        place = line.argmax()
        failed[row] = ~line[place].isfinite()
        if failed[row]:
            continue
        tokens[row] = place
        temperature = params.view(torch.float32)[Field.TEMPERATURE]
        if temperature > 0:
            weights = ((line - line[place]) / temperature).exp()
            kept = weights >= threshold(weights, params)
            cumulative = integers(weights).where(kept, 0).cumsum(0)
            target = fraction(cumulative[-1], draws(params[None], batch.positions[row : row + 1])[0], DRAW_BITS)
            tokens[row] = torch.searchsorted(cumulative, target, right=True)
    record(tokens, failed, state, batch)
    if batch.needs.top_logprobs is None:
        return Sampled(tokens, failed)
    return Sampled(tokens, failed, *logprobs(raw, tokens, batch.needs.top_logprobs))


def adjust(logits: Tensor, state: SamplingState, batch: SamplingBatch) -> Tensor:
    """Biases, stop tokens that wait and penalties, in place. `logits` is [rows, vocab] float32, and returned."""
    for row, (slot, position) in enumerate(zip(batch.slots.tolist(), batch.positions.tolist(), strict=True)):
        needs = state.needs[slot]
        if slot < 0 or not (needs.edits or needs.penalties):
            continue
        line, params = logits[row], state.params[slot]
        words = params[: Field.END].tolist()
        first = Field.END + words[Field.NUM_STOPS]
        second = first + words[Field.NUM_BIASES]
        biased = params[first:second]
        line[biased] += params[second : second + len(biased)].view(torch.float32)
        if position < words[Field.STOPS_FROM]:
            line[params[Field.END : first]] = float("-inf")
        if words[Field.PENALISED]:
            _penalise(line, state.counts[slot], params.view(torch.float32))
    return logits


def mask(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """What a row's mask does not allow becomes -inf, in place. `logits` is [rows, vocab] float32, and returned."""
    if batch.bitmask is None or batch.mask_rows is None:
        return logits
    lines, masks = logits.numpy(), batch.bitmask.numpy().view(np.uint8)
    for row, number in enumerate(batch.mask_rows.tolist()):
        if number >= 0:
            greatest = np.take(_GREATEST, masks[number], axis=0).reshape(-1)
            np.fmin(lines[row], greatest[: lines.shape[1]], out=lines[row])  # of a NaN and -inf, -inf
    return logits


def _penalise(line: Tensor, counts: Tensor, floats: Tensor) -> None:
    """`line` and `counts` are [vocab]."""
    seen = torch.from_numpy(np.flatnonzero(counts.numpy() != 0))
    count, values = counts[seen] & MAX_COUNT, line[seen]
    penalty = floats[Field.REPETITION_PENALTY]
    values = torch.where(values > 0, values / penalty, values * penalty)
    values = values.clamp(max=torch.finfo(line.dtype).max)  # a penalty near 0 overflows
    once = floats[Field.PRESENCE_PENALTY] + floats[Field.FREQUENCY_PENALTY] * count
    line[seen] = torch.where(count > 0, values - once, values)


def integers(weights: Tensor) -> Tensor:
    """Weights as they are summed, int64."""
    return (weights * 2.0**WEIGHT_BITS).long()


def draws(params: Tensor, positions: Tensor) -> Tensor:
    """Fractions of 2^31, [rows] int64. `params` is [rows, words], `positions` [rows]."""
    seeds = params[:, Field.SEED_LOW : Field.SEED_HIGH + 1].contiguous().view(torch.int64).squeeze(1)
    return torch.from_numpy((philox(seeds.numpy(), positions.long().numpy()) >> np.uint64(32 - DRAW_BITS)).view(np.int64))


def threshold(weights: Tensor, params: Tensor) -> Tensor:
    """The least weight that stays, float32.

    top_k leaves the k greatest and what is equal to the least of them. Of what that leaves, a weight stays for top_p while the
    sum of all that are greater has not reached top_p of the whole. min_p is a share of the greatest weight, which is 1.

    Args:
        weights: [vocab] float32.
        params: the slot's row.
    """
    least = params.view(torch.float32)[Field.MIN_P].clone()
    ordered = weights.sort(descending=True).values
    if params[Field.TOP_K]:
        least = torch.maximum(least, (kth := ordered[params[Field.TOP_K] - 1]))
        ordered = ordered[ordered >= kth]
    if params[Field.TOP_P] < TOP_P_ONE:
        sums = integers(ordered).cumsum(0)
        target = fraction(sums[-1], params[Field.TOP_P].long(), 30).clamp(min=1)
        least = torch.maximum(least, ordered[torch.searchsorted(sums, target)])
    return least


def record(tokens: Tensor, failed: Tensor, state: SamplingState, batch: SamplingBatch) -> None:
    """Write tokens that were sampled to the history and, for rows with penalties, to the counts."""
    rows = ((batch.slots >= 0) & ~failed).nonzero().squeeze(1)
    slots, chosen = batch.slots[rows], tokens[rows]
    state.history[slots, batch.positions[rows]] = chosen.int()
    if batch.needs.penalties:
        penalised = state.params[slots, Field.PENALISED].nonzero().squeeze(1)
        slots, chosen = slots[penalised], chosen[penalised]
        counts = state.counts[slots, chosen]
        state.counts[slots, chosen] = torch.where(counts & MAX_COUNT == MAX_COUNT, counts, counts + 1)


def logprobs(raw: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `tokens`, and the ids and log-probabilities of the `count` likeliest. `raw` is [rows, vocab]."""
    lines = raw.float().log_softmax(-1)
    top = lines.topk(min(count, raw.shape[1]))
    return lines.gather(1, tokens.unsqueeze(1)).squeeze(1), top.indices, top.values
