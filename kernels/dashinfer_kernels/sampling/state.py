"""What sampling knows of the running sequences: parameters, token counts and history, a row a slot, on the device.

A slot's row is written when a sequence enters and by `sample` itself afterwards, so a step brings nothing but the slot and the
position of each of its rows. Knows nothing of requests; values are checked where they come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

LEAST_TEMPERATURE = 1e-5  # below it a row is greedy: nothing but the likeliest token and its exact ties has a chance there
TOP_P_ONE = 2**30  # top_p is a fraction of it
MAX_COUNT = 2**15 - 1  # of one token in one output; counts stay there
IN_PROMPT = -(2**15)  # the bit of a count that says that the prompt has the token
MAX_VOCAB = 2**20  # sums of weights fit 63 bits


class Field(IntEnum):
    """Words of a slot's row of parameters; stop tokens, biased tokens and their biases follow the last."""

    TEMPERATURE = 0  # float32 bits; 0: greedy
    TOP_K = 1  # 0: off
    TOP_P = 2  # of TOP_P_ONE
    MIN_P = 3  # float32 bits
    PRESENCE_PENALTY = 4  # float32 bits
    FREQUENCY_PENALTY = 5  # float32 bits
    REPETITION_PENALTY = 6  # float32 bits
    PENALISED = 7  # 1 where any penalty is on, and counts are kept
    SEED_LOW = 8
    SEED_HIGH = 9
    STOPS_FROM = 10  # stop tokens have no chance at positions before it
    NUM_STOPS = 11
    NUM_BIASES = 12
    LOGPROBS = 13  # how many of the likeliest are wanted; -1: no log-probabilities
    END = 16


@dataclass(frozen=True)
class Needs:
    """What a row's parameters ask of a step; a step has to bring what any of its rows needs."""

    draws: bool = False  # not greedy
    cuts: bool = False  # top_k or top_p
    edits: bool = False  # biases, or stop tokens that wait
    penalties: bool = False
    top_logprobs: int | None = None  # how many; None: no log-probabilities

    def __or__(self, other: "Needs") -> "Needs":
        counts = [each for each in (self.top_logprobs, other.top_logprobs) if each is not None]
        return Needs(
            self.draws or other.draws,
            self.cuts or other.cuts,
            self.edits or other.edits,
            self.penalties or other.penalties,
            max(counts, default=None),
        )


class SamplingState:
    """Rows for `num_slots` sequences of up to `max_length` tokens of `vocab_size`.

    Args:
        max_edits: room for each slot's stop tokens, and for its biases.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        vocab_size: int,
        *,
        device: torch.device | str = "cpu",
        max_edits: int = 1024,
    ) -> None:
        assert vocab_size <= MAX_VOCAB
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.params = self._zeros((num_slots, Field.END + 3 * max_edits), np.int32)  # [slots, words], see Field
        self.counts = self._zeros((num_slots, vocab_size), np.int16)  # [slots, vocab], in the output; IN_PROMPT; if penalised
        self.history = self._zeros((num_slots, max_length + 1), np.int32)  # [slots, positions], prompt and output
        self.needs = [Needs()] * num_slots  # in host memory
        self._max_edits = max_edits

    def _zeros(self, shape: tuple[int, int], dtype: type) -> Tensor:
        """Numpy's zeros take memory only where they are written."""
        return torch.from_numpy(np.zeros(shape, dtype)).to(self.device)

    def enter(
        self,
        slot: int,
        tokens: np.ndarray,
        prompt_length: int,
        *,
        seed: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        logprobs: int | None = None,
    ) -> None:
        """A sequence takes a slot. Copies to a GPU are queued behind what its stream does; nothing waits.

        Args:
            tokens: [length] int32, the prompt and then the output so far.
            prompt_length: tokens of the prompt.
            seed: a signed 64-bit number.
            temperature: below `LEAST_TEMPERATURE` the row is greedy.
            top_k: 0 is off.
            top_p: above 0; 1 is off.
            logit_bias: added to these tokens' logits; ids below the vocabulary.
            stop_token_ids: those that wait for `min_tokens` tokens of output; ids below the vocabulary.
            logprobs: None is off, k the chosen token's and the k likeliest ones'.
        """
        biases = logit_bias or {}
        stops = tuple(stop_token_ids) if prompt_length + min_tokens > len(tokens) else ()
        greedy = temperature < LEAST_TEMPERATURE
        penalised = repetition_penalty != 1 or presence_penalty != 0 or frequency_penalty != 0
        top_p_word = min(round(top_p * TOP_P_ONE), TOP_P_ONE)
        assert max(len(biases), len(stops)) <= self._max_edits

        row = np.zeros(Field.END + len(stops) + 2 * len(biases), np.int32)
        floats = row.view(np.float32)
        floats[Field.TEMPERATURE] = 0 if greedy else temperature
        row[Field.TOP_K] = min(top_k, self.vocab_size)
        row[Field.TOP_P] = top_p_word
        floats[Field.MIN_P] = min_p
        floats[Field.PRESENCE_PENALTY] = presence_penalty
        floats[Field.FREQUENCY_PENALTY] = frequency_penalty
        floats[Field.REPETITION_PENALTY] = repetition_penalty
        row[Field.PENALISED] = penalised
        row[Field.SEED_LOW : Field.SEED_HIGH + 1] = np.array([seed], "<i8").view("<i4")
        row[Field.STOPS_FROM] = prompt_length + min_tokens
        row[Field.NUM_STOPS] = len(stops)
        row[Field.NUM_BIASES] = len(biases)
        row[Field.LOGPROBS] = -1 if logprobs is None else logprobs
        row[Field.END : Field.END + len(stops)] = stops
        values = Field.END + len(stops) + len(biases)
        row[Field.END + len(stops) : values] = list(biases)
        floats[values:] = list(biases.values())
        self._write(self.params[slot], row)
        self._write(self.history[slot], np.array(tokens, np.int32))
        if penalised:
            self._write(self.counts[slot], self._count(tokens, prompt_length))
        self.needs[slot] = Needs(
            draws=not greedy,
            cuts=not greedy and (0 < top_k < self.vocab_size or top_p_word < TOP_P_ONE),
            edits=bool(biases or stops),
            penalties=penalised,
            top_logprobs=logprobs,
        )

    def _count(self, tokens: np.ndarray, prompt_length: int) -> np.ndarray:
        counts = np.bincount(tokens[prompt_length:], minlength=self.vocab_size)[: self.vocab_size]
        counts = counts.clip(max=MAX_COUNT).astype(np.int16)
        prompt = tokens[:prompt_length]
        counts[prompt[prompt < self.vocab_size]] |= IN_PROMPT
        return counts

    def _write(self, row: Tensor, values: np.ndarray) -> None:
        """Set the first of a row. Torch keeps a pinned buffer from being used again before its copy has run."""
        source = torch.from_numpy(values)
        if row.is_cuda:
            source = source.pin_memory()
        row[: len(source)].copy_(source, non_blocking=True)


@dataclass(frozen=True)
class SamplingBatch:
    """The rows of one step. Under CUDA graphs the tensors are static buffers, and the rest is what was captured."""

    slots: Tensor  # [rows] int32, no slot twice; -1: padding, whose token is 0
    positions: Tensor  # [rows] int32, of the token to sample
    needs: Needs  # of all rows together; more than they need costs time only
    bitmask: Tensor | None = None  # [masks, ceil(vocab / 32)] int32, a bit 1 for each token that a grammar allows, lowest first
    mask_rows: Tensor | None = None  # [rows] int32, which mask a row takes; -1: none

    @classmethod
    def build(cls, state: SamplingState, slots: Sequence[int], positions: Sequence[int]) -> "SamplingBatch":
        """The batch for these slots' next tokens, without masks."""
        needs = Needs()
        for each in {state.needs[slot] for slot in slots}:
            needs |= each
        return cls(*torch.tensor([slots, positions], dtype=torch.int32).to(state.device), needs)


@dataclass(frozen=True)
class Sampled:
    """What `sample` returns; the last three only where the step brings log-probabilities."""

    tokens: Tensor  # [rows] int64
    failed: Tensor  # [rows] bool: no finite logits; the token means nothing
    logprobs: Tensor | None = (
        None  # [rows] float32, of the chosen tokens; like the next two arbitrary for rows that ask for none
    )
    top_tokens: Tensor | None = None  # [rows, top_logprobs] int64, the likeliest first
    top_logprobs: Tensor | None = None  # [rows, top_logprobs] float32
