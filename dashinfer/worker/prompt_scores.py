"""`PromptScores`: log-probabilities of the tokens of prompts, for the sequences that ask for them.

A position's hidden state gives those of the token after it. Logits of many positions would take gigabytes, so they are computed
for a few rows at a time, and only a few numbers of each row are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dashinfer.types import Chunk, Enter, PromptLogprobs
from dashinfer.worker.staging import Download

ROWS = 64  # whose logits exist at a time


@dataclass(frozen=True)
class _Scored:
    """A chunk with positions to score: its index in the plan, its first row among the step's, and what is asked for."""

    index: int
    row: int
    slot: int
    start: int
    length: int
    count: int  # of the likeliest tokens


class PromptScores:
    """Knows which slots hold a sequence that asks."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[int, int]] = {}  # slot -> the likeliest tokens asked for, length of the prompt

    def enter(self, enter: Enter) -> None:
        """A sequence takes a slot."""
        if enter.sampling.prompt_logprobs is None:
            self._asked.pop(enter.slot, None)
        else:
            self._asked[enter.slot] = (enter.sampling.prompt_logprobs, enter.prompt_length)

    def compute(
        self, chunks: list[Chunk], hidden: Tensor, history: Tensor, logits: Callable[[Tensor], Tensor | None]
    ) -> "LaunchedScores | None":
        """Queue the work on a step's prompts. None: nobody asks, or this rank has no logits.

        Args:
            hidden: [tokens, hidden size], of the chunks' tokens, one chunk after the other.
            history: [slots, positions] int32, the tokens of each slot.
            logits: rows of `hidden` to float32 [rows, vocabulary], or to None.
        """
        if not (scored := self._find(chunks)):
            return None
        chosen, top_tokens, top_values = [], [], []
        most = max(each.count for each in scored)
        for each in scored:
            targets = history[each.slot, each.start + 1 : each.start + 1 + each.length].long()
            for begin in range(0, each.length, ROWS):
                end = min(begin + ROWS, each.length)
                found = logits(hidden[each.row + begin : each.row + end])
                if found is None:
                    continue
                total = found.logsumexp(-1, keepdim=True)
                chosen.append((found.gather(1, targets[begin:end, None]) - total).squeeze(1))
                values, tokens = found.topk(min(most, found.shape[1]), dim=-1)
                top_tokens.append(tokens.int())
                top_values.append(values - total)
        if not chosen:
            return None
        return LaunchedScores(scored, Download([torch.cat(chosen), torch.cat(top_tokens), torch.cat(top_values)]))

    def _find(self, chunks: list[Chunk]) -> list[_Scored]:
        if not self._asked:
            return []
        found, row = [], 0
        for index, chunk in enumerate(chunks):
            if (asked := self._asked.get(chunk.slot)) is not None:
                count, prompt_length = asked
                length = min(chunk.start + chunk.length, prompt_length - 1) - chunk.start
                if length > 0:
                    found.append(_Scored(index, row, chunk.slot, chunk.start, length, count))
            row += chunk.length
        return found


class LaunchedScores:
    """Scores on their way to the host."""

    def __init__(self, scored: list[_Scored], download: Download) -> None:
        self._scored, self._download = scored, download

    def result(self) -> dict[int, PromptLogprobs]:
        """By index of the plan's chunk, once they are there."""
        chosen, tokens, values = (each.numpy() for each in self._download.wait())
        found, row = {}, 0
        for each in self._scored:
            rows = slice(row, row + each.length)
            found[each.index] = PromptLogprobs(
                chosen[rows].tobytes(), each.count, tokens[rows, : each.count].tobytes(), values[rows, : each.count].tobytes()
            )
            row += each.length
        return found
