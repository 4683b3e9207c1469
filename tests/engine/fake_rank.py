"""A rank without a model: its "keys and values" are the prefix they stand for, and its "logits" a hash of the whole prefix.

Executing a plan therefore proves the plan: reading a block that holds another sequence's content, or nothing, or content that
a later plan will write, shows at once.
"""

import zlib
from array import array

from dashinfer.types import SamplingParams, StepPlan, StepResult


def next_token(prefix: tuple[int, ...], vocab_size: int = 50) -> int:
    """The token that the fake model continues `prefix` with."""
    return zlib.crc32(repr(prefix).encode()) % vocab_size


def continuation(prompt: list[int], params: SamplingParams) -> list[int]:
    """What an undisturbed run of one sequence gives."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + params.max_tokens:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


class FakeRank:
    """Executes plans as `dashinfer.worker.runner` does.

    Args:
        poison: a token; after it the "model" gives no finite logits.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, max_batch: int, max_step_tokens: int, poison: int | None = None
    ) -> None:
        self.poison = poison
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) -> the prefix up to there
        self.tokens: list[dict[int, int]] = [{} for _ in range(max_batch)]
        self.tables: list[list[int]] = [[] for _ in range(max_batch)]

    def execute(self, plan: StepPlan) -> StepResult:
        for enter in plan.enter:
            self.tokens[enter.slot] = dict(enumerate(array("i", enter.tokens)))
            self.tables[enter.slot] = []
        assert sum(chunk.length for chunk in plan.chunks) <= self.max_step_tokens
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks)
        decodes = [chunk.length == 1 and chunk.sample for chunk in plan.chunks]
        assert decodes == sorted(decodes, reverse=True)
        written: set[tuple[int, int]] = set()
        for chunk in plan.chunks:
            assert chunk.length > 0
            self.tables[chunk.slot] += chunk.new_blocks
            assert all(0 <= block < self.num_blocks for block in chunk.new_blocks)
            prefix = tuple(self.tokens[chunk.slot][position] for position in range(chunk.start + chunk.length))
            for position in range(chunk.start, chunk.start + chunk.length):
                place = self._place(chunk.slot, position)
                assert place not in written, "two sequences write to one place in one step"
                written.add(place)
                self.cache[place] = prefix[: position + 1]
        tokens: list[int] = []
        failed: list[int] = []
        for chunk in plan.chunks:
            end = chunk.start + chunk.length
            prefix = tuple(self.tokens[chunk.slot][position] for position in range(end))
            for position in range(end):
                assert self.cache.get(self._place(chunk.slot, position)) == prefix[: position + 1]
            if chunk.sample:
                if prefix[-1] == self.poison:
                    failed.append(len(tokens))
                self.tokens[chunk.slot][end] = next_token(prefix)
                tokens.append(self.tokens[chunk.slot][end])
        return StepResult(plan.step, tokens, failed=failed)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.block_size], position % self.block_size
