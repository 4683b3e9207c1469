"""Which sequences run, and what each computes in the next step. Synchronous and pure: no clock, no await, no torch, no text.

`schedule` makes a plan and may be called again before the plan's result is known: a rank feeds its own samples, so the next
plan needs only the *number* of tokens, not their values. `apply` takes the results in order and says what became of each
sequence; a sequence that ended meanwhile has its later samples dropped.

Policy: running sequences are served first in, first out; a decode never waits for a prefill, whose chunks take what is left of
the step's token budget. Waiting sequences enter in order as soon as a slot and the blocks for all their known tokens are there.
When blocks run out, the sequence that entered last gives up all of its own and goes back to the head of the queue, to be
computed again from its tokens ("preemption by recompute"); what the prefix cache still has of it is not computed twice.

A sequence with images or videos is computed up to the first that the ranks have not encoded yet. It does not enter before they
have what it begins with, and those behind it in the queue do not wait for that.
"""

import heapq
from array import array
from collections import deque
from itertools import islice

from msgspec import Struct

from dashinfer.engine.api import Medium
from dashinfer.engine.blocks import BlockPool, extend_hashes
from dashinfer.engine.media import MediaCache
from dashinfer.engine.sequence import Sequence
from dashinfer.types import Chunk, Enter, FinishReason, PromptLogprobs, StepPlan, StepResult, TokenLogprobs


class Update(Struct, frozen=True):
    """A sequence gained a token; with `finish` it also ended. With `failed` it ended without one: the model gave nothing."""

    sequence: Sequence
    token: int
    logprobs: TokenLogprobs | None
    finish: FinishReason | None
    failed: bool = False


class Scheduler:
    """Schedules over `num_blocks` blocks of `block_size` tokens and `max_batch` slots, `max_step_tokens` tokens a step."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch: int,
        max_step_tokens: int,
        prefix_cache: bool = True,
        media_cache: MediaCache | None = None,
    ) -> None:
        """`media_cache` where sequences may have media."""
        assert max_step_tokens >= max_batch, "every running sequence must be able to decode in every step"
        self.pool = BlockPool(num_blocks, prefix_cache=prefix_cache)
        self.block_size = block_size
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._free_slots = list(range(max_batch))  # a heap
        self._planned: deque[tuple[int, list[Sequence], dict[int, tuple[Sequence, int]]]] = deque()  # step, who samples,
        # and whose prompts are scored from where, of plans without a result
        self._step = 0
        self._media_cache = media_cache
        self._media_full = False  # a sequence has found no room in this plan, and those after it must not take it
        self._media_released = False  # a sequence has given up one of its media

    @property
    def num_planned(self) -> int:
        """Plans whose results are not applied yet."""
        return len(self._planned)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def stuck(self) -> list[Sequence]:
        """The waiting sequences that the next plans cannot admit: slots or blocks are lacking, for them or one before them."""
        slots, blocks, reserve = len(self._free_slots), self.pool.num_available, len(self.running)
        admissible = 0
        for sequence in self.waiting:
            blocks -= self._blocks_for(sequence.length)
            if admissible == slots or blocks < reserve:
                break
            admissible += 1
            reserve += 1
        return list(islice(self.waiting, admissible, None))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must fit into the pool at its full length."""
        assert self._blocks_for(sequence.prompt_length + sequence.params.max_tokens) <= self.pool.num_blocks
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, whatever it is doing. Ending an ended one does nothing."""
        if not sequence.ended:
            self._end(sequence)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute."""
        chunks: dict[Sequence, Chunk] = {}
        enter: list[Enter] = []
        self._media_released = True
        # What a sequence gives up may be the room that one before it has not found; no event would tell that one.
        while not chunks and self._media_released:
            self._media_full = self._media_released = False
            preempted = self._plan_running(chunks)
            enter = [] if preempted else self._admit(chunks)
        if not chunks:
            return None
        # Decodes first: attention treats them apart. The order within each group stays that of admission.
        ordered = sorted(chunks.items(), key=lambda item: not (item[1].length == 1 and item[1].sample))
        starts = {index: (sequence, chunk.start) for index, (sequence, chunk) in enumerate(ordered) if _scored(sequence)}
        self._planned.append((self._step, [sequence for sequence, chunk in ordered if chunk.sample], starts))
        plan = StepPlan(step=self._step, enter=enter, chunks=[chunk for _, chunk in ordered])
        self._step += 1
        return plan

    def apply(self, result: StepResult) -> list[Update]:
        """Take the result of the oldest plan that has none."""
        step, samplers, starts = self._planned.popleft()
        assert result.step == step and len(result.tokens) == len(samplers)
        for index, logprobs in result.prompt_logprobs.items():
            _add_prompt_logprobs(*starts[index], logprobs)
        updates = []
        for index, (sequence, token) in enumerate(zip(samplers, result.tokens, strict=True)):
            if sequence.ended:
                continue
            sequence.in_flight -= 1
            if index in result.failed:
                self._end(sequence)
                updates.append(Update(sequence, token, None, None, failed=True))
                continue
            sequence.tokens.append(token)
            finish: FinishReason | None = None
            if token in sequence.params.stop_token_ids:
                finish = "stop"
            elif sequence.num_output >= sequence.params.max_tokens:
                finish = "length"
            self._register(sequence)
            if finish:
                self._end(sequence)
            updates.append(Update(sequence, token, result.logprobs.get(index), finish))
        return updates

    # -- planning

    def _plan_running(self, chunks: dict[Sequence, Chunk]) -> bool:
        """Give every running sequence its share. True when blocks ran out and a sequence had to leave."""
        decodes = sum(sequence.num_to_compute == 1 for sequence in self.running)
        budget = self.max_step_tokens - decodes  # for chunks longer than one token
        preempted = False
        for sequence in list(self.running):
            remaining = sequence.num_to_compute
            if sequence.slot is None or remaining == 0:
                continue
            length = 1 if remaining == 1 else min(remaining, budget)
            if sequence.media is not None:
                length = min(length, self._reach(sequence, sequence.computed) - sequence.computed)
            if length == 0:
                continue
            needed = self._blocks_for(sequence.computed + length) - len(sequence.blocks)
            while needed > self.pool.num_available and sequence.slot is not None:
                self._preempt(self.running[-1])
                preempted = True
            if sequence.slot is None:
                continue
            if remaining > 1:
                budget -= length
            chunks[sequence] = self._compute(sequence, length, needed)
        return preempted

    def _admit(self, chunks: dict[Sequence, Chunk]) -> list[Enter]:
        """Let waiting sequences in while there are slots, tokens and blocks."""
        entered = []
        budget = self.max_step_tokens - sum(chunk.length for chunk in chunks.values())
        place = 0  # in the queue: those before it wait for their media
        while place < len(self.waiting) and self._free_slots and budget > 0:
            sequence = self.waiting[place]
            if sequence.in_flight:  # preempted, and some of its tokens are still to come
                break
            cached = self._cached_prefix(sequence)
            reach = len(sequence.tokens)
            if sequence.media is not None:
                computed = len(cached) * self.block_size
                reach = self._reach(sequence, computed)
                if reach == computed:
                    place += 1
                    continue
            self.pool.share(cached)
            missing = self._blocks_for(sequence.length) - len(cached)
            # One block in reserve for each running sequence, lest the newcomer's arrival preempt it right away.
            reserve = len(self.running)
            if missing + reserve > self.pool.num_available:
                self.pool.release(cached)
                break
            del self.waiting[place]
            sequence.blocks = list(cached)
            sequence.registered = len(cached)
            sequence.computed = len(cached) * self.block_size
            if not sequence.admitted:
                sequence.cached_tokens = sequence.computed
                sequence.admitted = True
            sequence.slot = heapq.heappop(self._free_slots)
            self.running.append(sequence)
            if sequence.media is not None:
                self._reach(sequence, sequence.computed)  # what was wanted is pinned
            entered.append(self._enter(sequence))
            length = min(sequence.num_to_compute, budget, reach - sequence.computed)
            budget -= length
            chunk = self._compute(sequence, length, self._blocks_for(sequence.computed + length) - len(cached))
            chunks[sequence] = Chunk(chunk.slot, chunk.start, chunk.length, chunk.sample, (*cached, *chunk.new_blocks))
        return entered

    def _enter(self, sequence: Sequence) -> Enter:
        assert sequence.slot is not None
        tokens, media = array("i", sequence.tokens).tobytes(), sequence.media
        if media is None:
            return Enter(sequence.slot, tokens, sequence.prompt_length, sequence.params)
        return Enter(sequence.slot, tokens, sequence.prompt_length, sequence.params, media.spans, media.positions, media.delta)

    def _reach(self, sequence: Sequence, computed: int) -> int:
        """The position up to which a sequence can be computed from `computed` on, as far as its media go: the first that shows
        what is not encoded. Asks for what is needed from there on, in order, while there is room."""
        cache, media = self._media_cache, sequence.media
        assert cache is not None and media is not None
        if computed >= media.spans[-1].end and not sequence.held:
            return sequence.length
        by_key = {medium.key: medium for medium in media.media}
        order = dict.fromkeys(span.key for span in media.spans if span.end > computed)
        self._release(sequence, sequence.held - order.keys())
        kept: set[bytes] = set()
        for key in order:
            barred = self._media_full and key not in sequence.held
            if barred or not self._hold(sequence, by_key[key]):
                # what is needed only after this must not keep its room
                self._release(sequence, sequence.held - kept)
                if barred or not self._hold(sequence, by_key[key]):
                    self._media_full = True
                    break
            kept.add(key)
        missing = (
            span.start for span in media.spans if span.end > computed and not (span.key in kept and cache.ready(span.key))
        )
        return max(computed, next(missing, sequence.length))

    def _hold(self, sequence: Sequence, medium: Medium) -> bool:
        assert self._media_cache is not None
        if not self._media_cache.hold(sequence, medium, pin=sequence.slot is not None):
            return False
        sequence.held.add(medium.key)
        return True

    def _release(self, sequence: Sequence, keys: set[bytes]) -> None:
        assert self._media_cache is not None or not keys
        for key in keys:
            self._media_cache.release(sequence, key)
            self._media_released = True
        sequence.held = sequence.held - keys

    def _compute(self, sequence: Sequence, length: int, num_new_blocks: int) -> Chunk:
        """Advance a sequence by `length` positions."""
        assert sequence.slot is not None
        new_blocks = self.pool.allocate(num_new_blocks) if num_new_blocks > 0 else []
        sequence.blocks += new_blocks
        start = sequence.computed
        sequence.computed += length
        sample = sequence.computed == sequence.length
        sequence.in_flight += sample
        self._register(sequence)
        return Chunk(sequence.slot, start, length, sample, tuple(new_blocks))

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the sequence's prefix that the pool knows. The last token is always computed: its logits are needed."""
        if not self.prefix_cache or sequence.params.prompt_logprobs is not None:
            return []
        extend_hashes(sequence.hashes, sequence.tokens, self.block_size, sequence.media)
        return self.pool.match(sequence.hashes[: (len(sequence.tokens) - 1) // self.block_size])

    def _register(self, sequence: Sequence) -> None:
        """Make the sequence's full blocks of known tokens findable. Their computation is planned, and ranks keep the order."""
        full = min(sequence.computed, len(sequence.tokens)) // self.block_size
        if not self.prefix_cache or full <= sequence.registered or sequence.slot is None:
            return
        extend_hashes(sequence.hashes, sequence.tokens, self.block_size, sequence.media)
        for index in range(sequence.registered, full):
            self.pool.register(sequence.blocks[index], sequence.hashes[index])
        sequence.registered = full

    # -- leaving

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _end(self, sequence: Sequence) -> None:
        for key in sequence.held:
            assert self._media_cache is not None
            self._media_cache.abandon(sequence, key)
        sequence.held = set()
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)
        sequence.ended = True

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._release(sequence, sequence.held)
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = None
        sequence.blocks = []
        sequence.computed = sequence.registered = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def _scored(sequence: Sequence) -> bool:
    return sequence.params.prompt_logprobs is not None


def _add_prompt_logprobs(sequence: Sequence, start: int, logprobs: PromptLogprobs) -> None:
    """Add what a chunk from `start` on gave, but for what is known from before a preemption."""
    known = sequence.prompt_logprobs
    chosen, tokens, values = array("f", logprobs.chosen), array("i", logprobs.top_tokens), array("f", logprobs.top_logprobs)
    for place in range(len(known) - start, len(chosen)):
        top = slice(place * logprobs.count, (place + 1) * logprobs.count)
        known.append(TokenLogprobs(chosen[place], tuple(tokens[top]), tuple(values[top])))
