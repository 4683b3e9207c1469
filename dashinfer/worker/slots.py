"""A rank's preallocated state of the running sequences: token ids, block tables and sampling parameters, a row a slot.

Everything lives in host memory, where plans arrive and step inputs are gathered. Rows are overwritten by the next sequence that
enters; nothing needs to be cleared.
"""

import msgspec
import numpy as np

from dashinfer.types import Chunk, Enter, SamplingParams


class Slots:
    """`max_batch` rows for sequences of up to `max_length` tokens of `vocab_size` in blocks of `block_size`."""

    def __init__(self, max_batch: int, max_length: int, block_size: int, vocab_size: int) -> None:
        self.tokens = np.zeros((max_batch, max_length + 1), dtype=np.int64)
        self.block_tables = np.zeros((max_batch, -(-max_length // block_size)), dtype=np.int32)
        self.num_blocks = [0] * max_batch
        self.prompt_lengths = [0] * max_batch
        self.sampling: list[SamplingParams | None] = [None] * max_batch
        self._vocab_size = vocab_size

    def enter(self, enter: Enter) -> None:
        """A sequence takes a row. Stop tokens beyond the vocabulary, which some models' files name, are dropped."""
        tokens = np.frombuffer(enter.tokens, dtype="<i4")
        self.tokens[enter.slot, : len(tokens)] = tokens
        self.num_blocks[enter.slot] = 0
        self.prompt_lengths[enter.slot] = enter.prompt_length
        known = tuple(token for token in enter.sampling.stop_token_ids if 0 <= token < self._vocab_size)
        self.sampling[enter.slot] = msgspec.structs.replace(enter.sampling, stop_token_ids=known)

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

    def params(self, slot: int) -> SamplingParams:
        params = self.sampling[slot]
        assert params is not None
        return params
