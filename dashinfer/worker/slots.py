"""A rank's preallocated state of the running sequences: token ids, block tables and what sampling needs, a row a slot.

Token ids and block tables live in host memory, where plans arrive and step inputs are gathered; the state of sampling lives on
the device. Rows are overwritten by the next sequence that enters; nothing needs to be cleared.
"""

import numpy as np
import torch

from dashinfer.types import Chunk, Enter
from dashinfer_kernels import SamplingState


class Slots:
    """`max_batch` rows for sequences of up to `max_length` tokens of `vocab_size` in blocks of `block_size`."""

    def __init__(
        self, max_batch: int, max_length: int, block_size: int, vocab_size: int, device: torch.device | str = "cpu"
    ) -> None:
        self.tokens = np.zeros((max_batch, max_length + 1), dtype=np.int64)
        self.block_tables = np.zeros((max_batch, -(-max_length // block_size)), dtype=np.int32)
        self.num_blocks = [0] * max_batch
        self.sampling = SamplingState(max_batch, max_length, vocab_size, device=device)

    def enter(self, enter: Enter) -> None:
        """A sequence takes a row. Stop tokens beyond the vocabulary, which some models' files name, are dropped."""
        tokens = np.frombuffer(enter.tokens, dtype="<i4")
        self.tokens[enter.slot, : len(tokens)] = tokens
        self.num_blocks[enter.slot] = 0
        params = enter.sampling
        known = tuple(token for token in params.stop_token_ids if 0 <= token < self.sampling.vocab_size)
        self.sampling.enter(
            enter.slot,
            tokens,
            enter.prompt_length,
            seed=params.seed,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=params.logit_bias,
            min_tokens=params.min_tokens,
            stop_token_ids=known,
            logprobs=params.logprobs,
        )

    def extend(self, chunk: Chunk) -> None:
        """Append a chunk's new blocks to its row's block table."""
        if chunk.new_blocks:
            start = self.num_blocks[chunk.slot]
            end = start + len(chunk.new_blocks)
            self.block_tables[chunk.slot, start:end] = chunk.new_blocks
            self.num_blocks[chunk.slot] = end

    def input_ids(self, chunks: list[Chunk]) -> np.ndarray:
        """The token ids of a step, int64 [tokens], chunk after chunk."""
        return np.concatenate([self.tokens[c.slot, c.start : c.start + c.length] for c in chunks])
