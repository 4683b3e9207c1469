"""Sampling on CPU: a row at a time, which stays in cache, with numpy's vectorised argmax, partition and sort."""

import numpy as np
import torch
from torch import Tensor

from dashinfer_kernels.sampling.reference import DRAW_BITS, adjust, draws, fraction, integers, logprobs, record
from dashinfer_kernels.sampling.state import TOP_P_ONE, Field, Sampled, SamplingBatch, SamplingState


def sample(logits: Tensor, state: SamplingState, batch: SamplingBatch) -> Sampled:
    needs = batch.needs
    slots = batch.slots.long()
    lines = _chosen_lines(logits, state, slots) if needs.top_logprobs is not None else None
    logits = logits.float()
    if needs.edits or needs.penalties or batch.bitmask is not None:
        adjust(logits, state, batch)
    tokens = torch.from_numpy(logits.numpy().argmax(-1))  # the first NaN where there is one
    peaks = logits.gather(1, tokens.unsqueeze(1))
    failed = (~peaks.isfinite()).squeeze(1) & (slots >= 0)
    tokens.masked_fill_(failed | (slots < 0), 0)
    if needs.draws:
        _draw(logits, peaks, tokens, ~failed & (slots >= 0), state, batch)
    record(tokens, failed, state, batch)
    if lines is None or needs.top_logprobs is None:
        return Sampled(tokens, failed)
    rows, raw = lines
    top = min(needs.top_logprobs, logits.shape[1])
    chosen = torch.zeros(len(slots))
    top_tokens, top_logprobs = torch.zeros(len(slots), top, dtype=torch.int64), torch.zeros(len(slots), top)
    chosen[rows], top_tokens[rows], top_logprobs[rows] = logprobs(raw, tokens[rows], top)
    return Sampled(tokens, failed, chosen, top_tokens, top_logprobs)


def _chosen_lines(logits: Tensor, state: SamplingState, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that ask for log-probabilities, and a copy of them."""
    rows = ((slots >= 0) & (state.params[slots, Field.LOGPROBS] >= 0)).nonzero().squeeze(1)
    return rows, logits[rows]


def _draw(logits: Tensor, peaks: Tensor, tokens: Tensor, valid: Tensor, state: SamplingState, batch: SamplingBatch) -> None:
    """Overwrites the tokens of those valid rows that are not greedy. `logits` [rows, vocab] is overwritten, too."""
    params = state.params[batch.slots.long()]
    temperatures = params[:, Field.TEMPERATURE].view(torch.float32)
    numerators = draws(params, batch.positions)
    for row in (valid & (temperatures > 0)).nonzero().squeeze(1).tolist():
        weights = logits[row].sub_(peaks[row]).div_(temperatures[row]).exp_()
        cumulative = integers(weights)
        words = params[row]
        if (least := _threshold(weights.numpy(), cumulative, words)) > 0:
            cumulative.masked_fill_(weights < least, 0)
        torch.cumsum(cumulative, 0, out=cumulative)
        target = fraction(cumulative[-1], numerators[row], DRAW_BITS)
        tokens[row] = torch.searchsorted(cumulative, target, right=True)


def _threshold(weights: np.ndarray, sums: Tensor, params: Tensor) -> float:
    """As the reference's. `weights` is [vocab] float32, `sums` the same as integers."""
    least = float(params.view(torch.float32)[Field.MIN_P])
    top_k, top_p = int(params[Field.TOP_K]), int(params[Field.TOP_P])
    if 0 < top_k < len(weights):
        kth = float(np.partition(weights, len(weights) - top_k)[len(weights) - top_k])
        least = max(least, kth)
        weights = weights[weights >= kth]
    if top_p < TOP_P_ONE:
        if len(weights) == len(sums):
            total = sums.sum()
            # what is below this does, all together, not bring what top_p leaves out
            negligible = (1 - top_p / TOP_P_ONE) * float(total) * 2.0**-40 / len(weights)
            candidates = weights[weights >= np.float32(0.99 * negligible)]
        else:
            candidates = weights
            total = integers(torch.from_numpy(weights)).sum()
        ordered = np.sort(candidates)[::-1]
        cumulative = integers(torch.from_numpy(ordered.copy())).cumsum(0)
        target = fraction(total, params[Field.TOP_P].long(), 30).clamp(min=1)
        least = max(least, float(ordered[int(torch.searchsorted(cumulative, target))]))
    return least
