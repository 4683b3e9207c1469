"""From logits to tokens, one row a sequence.

A row's token is a function of its own logits, its own parameters, its seed and its position: neither the other rows nor the
time change it. Randomness is one uniform number per token, hashed from seed and position, that is looked up in the cumulative
distribution over the vocabulary in the order of token ids. Cuts are thresholds on values, so ties are kept together and the
result does not depend on how a sort breaks them.

Requests may ask for the extreme: whatever finite logits a model gives, and whatever the parameters, a row gets a token. Logits
that are not finite (an overflow in float16) are the model's failure; their rows are reported and do not disturb the others.
"""

import hashlib
import math
import struct

import numpy as np
import torch
from torch import Tensor

from dashinfer.types import Chunk, SamplingParams, TokenLogprobs
from dashinfer.worker.slots import Slots

FIRST_CANDIDATES = 512  # likeliest tokens looked at for top_p before the whole vocabulary is sorted
LEAST_TEMPERATURE = 1e-5  # below it a row is greedy: nothing but the likeliest token and its exact ties has a chance there


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class Sampler:
    """Samples for the sequences in `slots`."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def __call__(self, logits: Tensor, chunks: list[Chunk]) -> tuple[list[int], dict[int, TokenLogprobs], list[int]]:
        """Sample the token after each chunk.

        Args:
            logits: float32 [chunks, vocabulary]; may be overwritten.
            chunks: those that sample, in the order of the rows.

        Returns:
            A token id a row; the log-probabilities of those rows that asked for them; and the rows without finite logits,
            whose token is some id of the vocabulary.
        """
        params = [self._slots.params(chunk.slot) for chunk in chunks]
        wanted = {row: each.logprobs for row, each in enumerate(params) if each.logprobs is not None}
        raw = logits[list(wanted)].log_softmax(-1) if wanted else None
        for row, (chunk, each) in enumerate(zip(chunks, params, strict=True)):
            self._adjust(logits[row], chunk, each)
        peaks, likeliest = logits.max(-1)  # a peak is NaN where any of the row is
        tokens = self._draw(logits, peaks, likeliest, chunks, params)
        failed = [row for row, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]
        logprobs = {}
        if raw is not None:
            for (row, count), line in zip(wanted.items(), raw, strict=True):
                if row not in failed:
                    logprobs[row] = _token_logprobs(line, tokens[row], count)
        return tokens, logprobs, failed

    def _adjust(self, row: Tensor, chunk: Chunk, params: SamplingParams) -> None:
        """Bias and penalties, in place. `row` is [vocabulary]."""
        length = chunk.start + chunk.length
        prompt_length = self._slots.prompt_lengths[chunk.slot]
        tokens = self._slots.tokens[chunk.slot]
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        if length - prompt_length < params.min_tokens and params.stop_token_ids:
            row[torch.tensor(params.stop_token_ids, device=row.device)] = float("-inf")
        if params.repetition_penalty != 1:
            seen = torch.from_numpy(tokens[:length]).to(row.device)
            values = row[seen]
            penalised = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
            row[seen] = penalised.clamp(max=torch.finfo(row.dtype).max)  # a penalty near 0 overflows
        output = tokens[prompt_length:length]
        if len(output) and (params.presence_penalty or params.frequency_penalty):
            unique, counts = np.unique(output, return_counts=True)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            row[torch.from_numpy(unique).to(row.device)] -= torch.from_numpy(penalty).to(row.device, row.dtype)

    def _draw(
        self, logits: Tensor, peaks: Tensor, tokens: Tensor, chunks: list[Chunk], params: list[SamplingParams]
    ) -> list[int]:
        """`peaks` and `tokens` are each row's greatest logit and its place, [chunks]; the latter is overwritten."""
        rows = [row for row, each in enumerate(params) if each.temperature >= LEAST_TEMPERATURE]
        if rows:
            drawn = [params[row] for row in rows]
            temperatures = torch.tensor([each.temperature for each in drawn], device=logits.device)
            # below the peak first: divided by a small temperature, the logits themselves could overflow
            probabilities = logits[rows].sub_(peaks[rows, None]).div_(temperatures[:, None]).softmax(-1)
            for index, each in enumerate(drawn):
                if each.top_k or each.top_p < 1 or each.min_p:
                    _cut(probabilities[index], each)
            draws = [uniform(each.seed, chunks[row].start + chunks[row].length) for row, each in zip(rows, drawn, strict=True)]
            cumulative = probabilities.to(torch.float64).cumsum(-1)
            targets = torch.tensor(draws, dtype=torch.float64, device=logits.device) * cumulative[:, -1]
            found = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
            tokens[rows] = found.clamp_(max=logits.shape[-1] - 1)
        return tokens.tolist()


def _cut(probabilities: Tensor, params: SamplingParams) -> None:
    """Set to zero, in place, what top_k, top_p and min_p exclude. `probabilities` is [vocabulary]."""
    vocab_size = probabilities.shape[-1]
    top_k = min(params.top_k or vocab_size, vocab_size)
    count = top_k if params.top_k else min(FIRST_CANDIDATES, vocab_size)
    threshold = torch.zeros((), device=probabilities.device)
    if params.top_k or params.top_p < 1:
        likeliest = probabilities.topk(count).values
        if params.top_k:
            threshold = likeliest[-1]
        if params.top_p < 1:
            mass = likeliest.sum() if params.top_k else 1.0
            if not params.top_k and likeliest.sum() < params.top_p:
                likeliest = probabilities.sort(descending=True).values
            before = likeliest.cumsum(0) - likeliest  # a token stays while those before it have not reached top_p
            stays = before < params.top_p * mass
            stays[0] = True  # even where top_p times the mass is too small for a float32
            threshold = torch.maximum(threshold, likeliest[stays][-1])
    if params.min_p:
        threshold = torch.maximum(threshold, params.min_p * probabilities.max())
    probabilities[probabilities < threshold] = 0


def _token_logprobs(line: Tensor, token: int, count: int) -> TokenLogprobs:
    """`line` is a row of log-probabilities, [vocabulary]."""
    values, ids = line.topk(min(count, line.shape[-1]))
    return TokenLogprobs(float(line[token]), tuple(ids.tolist()), tuple(values.tolist()))
