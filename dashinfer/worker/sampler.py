"""From a step's logits to the results that the parent is sent; how tokens are sampled is `dashinfer_kernels.sample`'s matter.

Requests may ask for the extreme: whatever finite logits a model gives, and whatever the parameters, a row gets a token. Logits
that are not finite (an overflow in float16) are the model's failure; their rows are reported and do not disturb the others.
"""

from torch import Tensor

from dashinfer.types import Chunk, TokenLogprobs
from dashinfer.worker.slots import Slots
from dashinfer_kernels import SamplingBatch, sample


class Sampler:
    """Samples for the sequences in `slots`."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def __call__(self, logits: Tensor, chunks: list[Chunk]) -> tuple[list[int], dict[int, TokenLogprobs], list[int]]:
        """Sample the token after each chunk.

        Args:
            logits: float32 [chunks, vocabulary]; may be overwritten.
            chunks: those that sample, in the order of the rows; no slot twice.

        Returns:
            A token id a row; the log-probabilities of those rows that asked for them; and the rows without finite logits,
            whose token is some id of the vocabulary.
        """
        state = self._slots.sampling
        positions = [chunk.start + chunk.length for chunk in chunks]
        sampled = sample(logits, state, SamplingBatch.build(state, [chunk.slot for chunk in chunks], positions))
        tokens = sampled.tokens.tolist()
        failed = [row for row, each in enumerate(sampled.failed.tolist()) if each]
        logprobs = {}
        if sampled.logprobs is not None and sampled.top_tokens is not None and sampled.top_logprobs is not None:
            lines = zip(sampled.logprobs.tolist(), sampled.top_tokens.tolist(), sampled.top_logprobs.tolist(), strict=True)
            for row, (chunk, (chosen, ids, values)) in enumerate(zip(chunks, lines, strict=True)):
                count = state.needs[chunk.slot].top_logprobs
                if count is not None and row not in failed:
                    logprobs[row] = TokenLogprobs(chosen, tuple(ids[:count]), tuple(values[:count]))
        return tokens, logprobs, failed
