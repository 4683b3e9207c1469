"""Sampling on CPU: a row at a time, which stays in cache, with numpy's vectorised argmax, partition and sort."""

import numpy as np
import torch
from torch import Tensor

from dashinfer_kernels.sampling.reference import DRAW_BITS, WEIGHT_BITS, adjust, draws, logprobs, mask, record
from dashinfer_kernels.sampling.state import TOP_P_ONE, Field, Sampled, SamplingBatch, SamplingState

BLOCK = 64  # tokens whose greatest weight stands for all of them where the k greatest are looked for


def sample(logits: Tensor, state: SamplingState, batch: SamplingBatch) -> Sampled:
    needs = batch.needs
    slots = batch.slots.long()
    lines = _chosen_lines(logits, state, slots) if needs.top_logprobs is not None else None
    logits = logits.float()
    if needs.edits or needs.penalties:
        adjust(logits, state, batch)
    mask(logits, batch)
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
    numerators = draws(params, batch.positions).tolist()
    for row in (valid & (temperatures > 0)).nonzero().squeeze(1).tolist():
        weights = logits[row].sub_(peaks[row]).div_(temperatures[row]).exp_().numpy()
        ids, kept = _cut(weights, params[row, : Field.END])
        cumulative = _integers(kept).cumsum()
        place = cumulative.searchsorted(int(cumulative[-1]) * numerators[row] >> DRAW_BITS, side="right")
        tokens[row] = int(place if ids is None else ids[place])


def _integers(weights: np.ndarray) -> np.ndarray:
    return (weights * np.float32(2.0**WEIGHT_BITS)).astype(np.int64)


def _cut(weights: np.ndarray, params: Tensor) -> tuple[np.ndarray | None, np.ndarray]:
    """The tokens that stay, None for all, and their weights; with the reference's threshold. `weights` is [vocab] float32."""
    words, vocab_size = params.numpy(), len(weights)
    least = words.view(np.float32)[Field.MIN_P]
    top_k, top_p = int(words[Field.TOP_K]), int(words[Field.TOP_P])
    candidates = weights
    if 0 < top_k < vocab_size:
        candidates = candidates[candidates >= _bound(weights, top_k)]
        kth = np.partition(candidates, len(candidates) - top_k)[len(candidates) - top_k]
        candidates = candidates[candidates >= kth]
        least = max(least, kth)
    if top_p < TOP_P_ONE:
        total = int(_integers(candidates).sum())
        # weights below this one do not amount, all together, to what top_p leaves out
        negligible = 0.99 * (1 - top_p / TOP_P_ONE) * total * 2.0**-WEIGHT_BITS / len(candidates)
        ordered = np.sort(candidates[candidates >= np.float32(negligible)])[::-1]
        place = _integers(ordered).cumsum().searchsorted(max(total * top_p // TOP_P_ONE, 1))
        least = max(least, ordered[place])
    if least == 0:
        return None, weights
    ids = np.flatnonzero(weights >= least)
    return ids, weights[ids]


def _bound(weights: np.ndarray, top_k: int) -> float:
    """A weight that at least `top_k` reach: as many blocks have one that does."""
    blocks = len(weights) // BLOCK
    if top_k > blocks:
        return 0
    return np.partition(weights[: blocks * BLOCK].reshape(blocks, BLOCK).max(-1), blocks - top_k)[blocks - top_k]
