"""A rank without a model: its "keys and values" are the prefix they stand for, and its "logits" a hash of the whole prefix.

Executing a plan therefore proves the plan: reading a block that holds another sequence's content, or nothing, or content that
a later plan will write, shows at once.
"""

import zlib
from array import array
from collections import deque
from collections.abc import Collection

from dashinfer.engine.api import Medium, PromptMedia
from dashinfer.types import Encode, Forget, MediaSpan, SamplingParams, StepPlan, StepResult

PLACEHOLDER = 99
Seen = int | tuple[bytes, int]  # a token, or an embedding: its medium and its number there


def medium(number: int) -> Medium:
    """One of `number + 1` tokens."""
    return Medium(bytes([number]) * 32, (1, 2, 2 * (number + 1)), b"", number + 1)


def show(prompt: list[int], media: list[tuple[int, int]]) -> tuple[list[int], PromptMedia]:
    """A prompt with media (where in the prompt, number) in it."""
    tokens, spans, done = [], [], 0
    for place, number in sorted(media):
        tokens += prompt[done:place]
        done = max(done, place)
        shown = medium(number)
        spans.append(MediaSpan(shown.key, len(tokens), 0, shown.tokens))
        tokens += [PLACEHOLDER] * shown.tokens
    tokens += prompt[done:]
    distinct = {number: medium(number) for _, number in media}
    positions = array("i", 3 * list(range(len(tokens)))).tobytes()
    return tokens, PromptMedia(tuple(distinct.values()), tuple(spans), positions, 0)


def seen(tokens: list[int], spans: tuple[MediaSpan, ...]) -> list[Seen]:
    """What the model takes."""
    result: list[Seen] = list(tokens)
    for span in spans:
        result[span.start : span.end] = [(span.key, span.offset + index) for index in range(span.length)]
    return result


def next_token(prefix: tuple[Seen, ...], seed: int = 0, vocab_size: int = 50) -> int:
    """The token that the fake model continues `prefix` with."""
    return zlib.crc32(repr(prefix).encode(), seed) % vocab_size


def continuation(prompt: list[int], params: SamplingParams, media: PromptMedia | None = None) -> list[int]:
    """What an undisturbed run of one sequence gives."""
    tokens = seen(prompt, media.spans if media else ())
    while len(tokens) < len(prompt) + params.max_tokens:
        tokens.append(next_token(tuple(tokens), params.seed))
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


class FakeRank:
    """Executes plans as `dashinfer.worker.runner` does.

    Args:
        poison: a token; after it the "model" gives no finite logits.
        media_tokens: of which embeddings are held at most, but for a single medium.
        stages: of a pipeline. The first has the tokens of plan k when it begins plan k + `stages`, not sooner.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch: int,
        max_step_tokens: int,
        poison: int | None = None,
        media_tokens: int = 0,
        stages: int = 1,
    ) -> None:
        self.stages = stages
        self.late: deque[tuple[int, int, int, int]] = deque()  # step, slot, position and token
        self.media_tokens = media_tokens
        self.media: dict[bytes, int] = {}  # tokens of what is held or about to be
        self.encoded: set[bytes] = set()
        self.poison = poison
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_step_tokens = max_step_tokens
        self.cache: dict[tuple[int, int], tuple[Seen, ...]] = {}  # (block, offset) -> the prefix up to there
        self.tokens: list[dict[int, Seen]] = [{} for _ in range(max_batch)]
        self.tables: list[list[int]] = [[] for _ in range(max_batch)]
        self.seeds = [0] * max_batch

    def tell(self, message: Encode | Forget) -> None:
        match message:
            case Encode(key=key, grid=grid):
                assert key not in self.media
                self.media[key] = grid[0] * grid[1] * grid[2] // 4
                assert sum(self.media.values()) <= self.media_tokens or len(self.media) == 1
            case Forget(keys=keys):
                for key in keys:
                    del self.media[key]
                    self.encoded.discard(key)

    def encode(self, count: int) -> list[bytes]:
        """Encode up to so many media, and say which."""
        keys = [key for key in self.media if key not in self.encoded][:count]
        self.encoded.update(keys)
        return keys

    def reset(self) -> None:
        """As after `dashinfer.types.Reset`; what the blocks hold counts no more, either."""
        self.cache.clear()
        self.late.clear()
        for slot in range(len(self.tables)):
            self.tokens[slot], self.tables[slot] = {}, []

    def execute(self, plan: StepPlan, *, finish: Collection[bytes] = ()) -> StepResult:
        """`finish`: media that are encoded first if they are needed."""
        while self.late and self.late[0][0] + self.stages <= plan.step:
            _, slot, position, token = self.late.popleft()
            self.tokens[slot][position] = token
        for enter in plan.enter:
            self.tokens[enter.slot] = dict(enumerate(seen(list(array("i", enter.tokens)), enter.media)))
            self.tables[enter.slot] = []
            self.seeds[enter.slot] = enter.sampling.seed
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
                if not isinstance(prefix[position], int):
                    key = prefix[position][0]
                    if key in finish and key in self.media:
                        self.encoded.add(key)
                    assert key in self.encoded
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
                tokens.append(next_token(prefix, self.seeds[chunk.slot]))
                self.late.append((plan.step, chunk.slot, end, tokens[-1]))
        return StepResult(plan.step, tokens, failed=failed)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.block_size], position % self.block_size
