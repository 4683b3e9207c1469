"""Which sequences run, and what each computes in the next step. Synchronous and pure: no clock, no await, no torch, no text.

`schedule` makes a plan and may be called again before the plan's result is known: a rank feeds its own samples, so the next
plan needs only the *number* of tokens, not their values. `apply` takes the results in order and says what became of each
sequence; a sequence that ended meanwhile has its later samples dropped. When ranks have lost what they knew, `recover` takes
back the plans without a result, and all is computed again.

Policy: running sequences are served first in, first out; a decode never waits for a prefill, whose chunks take what is left of
the step's token budget. Waiting sequences enter in order as soon as a slot and the blocks for all their known tokens are there.
When blocks run out, the sequence that entered last gives up all of its own and goes back to the head of the queue, to be
computed again from its tokens ("preemption by recompute"); what the prefix cache still has of it is not computed twice.

A sequence with images or videos is computed up to the first that the ranks have not encoded yet. It does not enter before they
have what it begins with, and those behind it in the queue do not wait for that.

With a pipeline of M stages, M plans are computed at a time, each by another stage, and the first stage has the tokens of plan j
only when it begins plan j + M. So what plan j samples in a slot, no plan before j + M uses that slot, for the same sequence or
another one. Sequences are split evenly over M plans, which take turns. Where there are fewer sequences than that, numbers of
plans are left out: the first stage then waits for the tokens, and nobody for the parent.
"""

import math
from array import array
from bisect import insort
from collections import Counter, deque
from collections.abc import Iterable
from itertools import chain, islice

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


class _Planned(Struct, frozen=True):
    """A plan without a result."""

    step: int
    sequences: list[Sequence]
    samplers: list[Sequence]
    positions: list[int]  # that they sample
    scored: dict[int, tuple[Sequence, int]]  # by index of the chunk: who asks for something of its prompt, and its start
    tokens: int


class Scheduler:
    """Schedules over `num_blocks` blocks of `block_size` tokens and `max_batch` slots, `max_step_tokens` tokens a step.

    Attributes:
        max_running: sequences that may run at once, up to `max_batch`; never more than `max_step_tokens`.
        alone: the only sequence that is computed, or None. See `isolate`.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_batch: int,
        max_step_tokens: int,
        prefix_cache: bool = True,
        media_cache: MediaCache | None = None,
        stages: int = 1,
    ) -> None:
        """`media_cache` where sequences may have media; `stages` of the pipeline."""
        assert max_step_tokens >= max_batch, "every running sequence must be able to decode in every step"
        self.pool = BlockPool(num_blocks, prefix_cache=prefix_cache)
        self.block_size = block_size
        self.max_batch = self.max_running = max_batch
        self.alone: Sequence | None = None
        self.max_step_tokens = max_step_tokens
        self.prefix_cache = prefix_cache
        self.stages = stages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._free_slots = list(range(max_batch))  # ascending
        self._usable_from = [0] * max_batch  # for each slot, the number of the first plan that may use it
        self._planned: deque[_Planned] = deque()
        self._unmasked: deque[_Planned] = deque()  # those of them whose masks are still to be computed
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

    @property
    def next_step(self) -> int:
        """The number that the next plan has, if there is one."""
        return self._step if self.stages == 1 else max(self._step, min(self._wanted_from(), default=0))

    @property
    def oldest_plan(self) -> tuple[list[Sequence], int]:
        """Sequences, and how many tokens, of the oldest plan without a result. There is one."""
        return self._planned[0].sequences, self._planned[0].tokens

    def stuck(self) -> list[Sequence]:
        """The waiting sequences that the next plans cannot admit: slots or blocks are lacking, for them or one before them, or
        another sequence is computed alone."""
        if self.alone is not None:
            return [sequence for sequence in self.waiting if sequence is not self.alone]
        admissible = self._num_admissible(sequence.length for sequence in self.waiting)
        return list(islice(self.waiting, admissible, None))

    def can_admit(self, length: int) -> bool:
        """Whether the next plans can admit a new sequence of so many tokens, after all that wait. Media are not looked at."""
        lengths = chain((sequence.length for sequence in self.waiting), [length])
        return self.alone is None and self._num_admissible(lengths) > len(self.waiting)

    @property
    def num_tokens(self) -> int:
        """Tokens that are still to compute, as far as is known: one for a sequence that decodes."""
        return sum(max(1, sequence.num_to_compute) for sequence in chain(self.running, self.waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, which must fit into the pool at its full length."""
        assert self._blocks_for(sequence.prompt_length + sequence.params.max_tokens) <= self.pool.num_blocks
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence now, whatever it is doing. Ending an ended one does nothing."""
        if not sequence.ended:
            self._end(sequence)

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute, or nothing before an earlier plan has its result."""
        while (plan := self._plan()) is None:
            later = min((number for number in self._wanted_from() if number > self._step), default=None)
            if later is None or (self._planned and later > self._planned[0].step + self.stages):
                return None
            self._step = later
        return plan

    def masks_due(self) -> tuple[int, dict[int, Sequence]] | None:
        """A step whose masks can be computed: its number, and the sequences that follow a grammar by their places among who
        samples. Each step with such sequences comes once, in order, as soon as all their tokens before it are known."""
        if not self._unmasked:
            return None
        planned = self._unmasked[0]
        guided = {
            row: sequence
            for row, sequence in enumerate(planned.samplers)
            if sequence.guide is not None and not sequence.ended and planned.positions[row] >= len(sequence.tokens)
        }
        guided_sequences = set(guided.values())
        for earlier in self._planned:
            if earlier is planned:
                break
            if not guided_sequences.isdisjoint(earlier.samplers):
                return None
        self._unmasked.popleft()
        return planned.step, guided

    def apply(self, result: StepResult) -> list[Update]:
        """Take the result of the oldest plan that has none."""
        planned = self._planned.popleft()
        assert result.step == planned.step and len(result.tokens) == len(planned.samplers)
        for index, logprobs in result.prompt_logprobs.items():
            _add_prompt_logprobs(*planned.scored[index], logprobs)
        for index, embedding in result.embeddings.items():
            planned.scored[index][0].embedding = embedding
        updates = []
        for index, (sequence, token) in enumerate(zip(planned.samplers, result.tokens, strict=True)):
            if sequence.ended or planned.positions[index] < len(sequence.tokens):  # what was forced stands there
                continue
            sequence.in_flight -= 1
            if index in result.failed:
                self._end(sequence)
                updates.append(Update(sequence, token, None, None, failed=True))
                continue
            updates.append(self._append(sequence, token, result.logprobs.get(index)))
        return updates

    def force(self, sequence: Sequence, tokens: list[int]) -> list[Update]:
        """Append tokens that can be no others, in place of those in flight. The next plan computes them together."""
        assert not sequence.ended and sequence.in_flight <= len(tokens)
        sequence.in_flight = 0
        sequence.told = len(sequence.tokens)  # what ranks sample in their place is not masked, and nothing
        updates = []
        for token in tokens:
            updates.append(self._append(sequence, token, None))
            if sequence.ended:
                break
        return updates

    def _append(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> Update:
        sequence.tokens.append(token)
        finish: FinishReason | None = None
        if token in sequence.params.stop_token_ids:
            finish = "stop"
        elif sequence.num_output >= sequence.params.max_tokens:
            finish = "length"
        self._register(sequence)
        if finish:
            self._end(sequence)
        return Update(sequence, token, logprobs, finish)

    def _num_admissible(self, lengths: Iterable[int]) -> int:
        """How many of the first of new sequences of such lengths the next plans can admit."""
        slots = min(len(self._free_slots), self.max_running - len(self.running))
        blocks, reserve = self.pool.num_available, len(self.running)
        admissible = 0
        for length in lengths:
            blocks -= self._blocks_for(length)
            if admissible >= slots or blocks < reserve:
                break
            admissible += 1
            reserve += 1
        return admissible

    def recover(self, *, media_lost: bool = True) -> list[Sequence]:
        """The ranks have lost what they knew of sequences and blocks, and of media if `media_lost`. No plan made so far has a
        result any more; what runs waits again, before what waited already.

        Returns:
            The sequences that the ranks were computing, or encoding media of.
        """
        computing = dict.fromkeys(sequence for plan in self._planned for sequence in plan.sequences if not sequence.ended)
        if self._media_cache is not None and (encoding := self._media_cache.encoding()):
            for sequence in (*self.running, *self.waiting):
                if sequence.media is not None and any(medium.key in encoding for medium in sequence.media.media):
                    computing[sequence] = None
        if self.alone is not None:  # others have come to the ranks only before it
            computing = {sequence: None for sequence in computing if sequence is self.alone}
        self.alone = None
        self._planned.clear()
        self._unmasked.clear()
        self._usable_from = [0] * self.max_batch
        for sequence in reversed(self.running.copy()):
            self._leave(sequence)
            self.waiting.appendleft(sequence)
        for sequence in self.waiting:
            sequence.in_flight = 0
            self._release(sequence, sequence.held)
        self.pool.reset()
        if self._media_cache is not None and media_lost:
            self._media_cache.reset()
        return list(computing)

    def isolate(self, sequence: Sequence | None) -> None:
        """Compute this one alone from now on, and no other before `isolate(None)`. All plans have their results."""
        assert not self._planned
        self.alone = sequence
        if sequence is None:
            return
        for other in reversed(self.running.copy()):
            if other is not sequence:
                self._leave(other)
                self.waiting.appendleft(other)
        if sequence.slot is None:
            self.waiting.remove(sequence)
            self.waiting.appendleft(sequence)

    # -- planning

    def _wanted_from(self) -> list[int]:
        """Of the slots that a plan could use, the numbers of the first plans that may."""
        slots = [sequence.slot for sequence in self.running if sequence.num_to_compute]
        return [self._usable_from[slot] for slot in chain(slots, self._free_slots if self.waiting else ()) if slot is not None]

    def _usable(self, slot: int | None) -> bool:
        return slot is not None and self._usable_from[slot] <= self._step

    def _plan(self) -> StepPlan | None:
        """The plan of this number; None when it would be empty."""
        chunks: dict[Sequence, Chunk] = {}
        enter: list[Enter] = []
        self._media_released = True
        # What a sequence gives up may be the room that one before it has not found; no event would tell that one.
        while not chunks and self._media_released:
            self._media_full = self._media_released = False
            turn, newcomers = self._take_turns()
            preempted = self._plan_running(turn, chunks)
            enter = [] if preempted else self._admit(newcomers, chunks)
        if not chunks:
            return None
        # Decodes first: attention treats them apart. The order within each group stays that of admission.
        ordered = sorted(chunks.items(), key=lambda item: not (item[1].length == 1 and item[1].sample))
        samplers = [sequence for sequence, chunk in ordered if chunk.sample]
        positions = [sequence.computed for sequence in samplers]
        masked = any(sequence.guide is not None for sequence in samplers)
        plan = StepPlan(step=self._step, enter=enter, chunks=[chunk for _, chunk in ordered], masked=masked)
        scored = {index: (sequence, chunk.start) for index, (sequence, chunk) in enumerate(ordered) if _scored(sequence)}
        tokens = sum(chunk.length for chunk in plan.chunks)
        self._planned.append(_Planned(self._step, list(chunks), samplers, positions, scored, tokens))
        if masked:
            self._unmasked.append(self._planned[-1])
        self._step += 1
        return plan

    def _take_turns(self) -> tuple[list[Sequence], int]:
        """The running sequences whose turn it is, in order of admission, and how many waiting ones may enter.

        With a pipeline, all that could be computed are dealt over this plan and the next ones as evenly as those are filled by
        the sequences that return there. Decodes come first, and of those the ones that were computed the longest ago.
        """
        if self.stages == 1:
            return self.running.copy(), len(self.waiting)
        able = [
            sequence
            for sequence in self.running
            if sequence.num_to_compute
            and self._usable(sequence.slot)
            and (sequence.media is None or self._reach(sequence, sequence.computed) > sequence.computed)
        ]
        newcomers = 0
        if (
            self.waiting and self._free_slots and len(self.running) < self.max_running
        ):  # at least one: it may need fewer blocks than is thought
            newcomers = max(1, self._num_admissible(sequence.length for sequence in self.waiting))
        returning = Counter(
            self._usable_from[sequence.slot]
            for sequence in self.running
            if sequence.slot is not None and sequence.num_to_compute and not self._usable(sequence.slot)
        )
        loads = [returning[self._step + offset] for offset in range(self.stages)]
        total = len(able) + newcomers
        share = total // self.stages  # the height to which this plan and the next ones are filled
        while sum(max(0, share - load) for load in loads) < total:
            share += 1
        able.sort(key=lambda sequence: self._usable_from[sequence.slot] if sequence.num_to_compute == 1 else math.inf)
        chosen = set(able[:share])
        return [sequence for sequence in self.running if sequence in chosen], share - len(chosen)

    def _plan_running(self, turn: list[Sequence], chunks: dict[Sequence, Chunk]) -> bool:
        """Give each running sequence whose turn it is its share. True when blocks ran out and a sequence had to leave."""
        decodes = sum(sequence.num_to_compute == 1 for sequence in turn)
        budget = self.max_step_tokens - decodes  # for chunks longer than one token
        preempted = False
        for sequence in turn:
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

    def _admit(self, most: int, chunks: dict[Sequence, Chunk]) -> list[Enter]:
        """Let waiting sequences in while there are slots, tokens and blocks."""
        entered: list[Enter] = []
        slots = [slot for slot in self._free_slots if self._usable(slot)]
        most = min(most, len(slots), self.max_running - len(self.running))
        budget = self.max_step_tokens - sum(chunk.length for chunk in chunks.values())
        place = 0  # in the queue: those before it wait for their media
        while place < len(self.waiting) and len(entered) < most and budget > 0:
            sequence = self.waiting[place]
            if sequence.in_flight:  # preempted, and some of its tokens are still to come
                break
            if self.alone is not None and sequence is not self.alone:
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
            sequence.slot = slots[len(entered)]
            self._free_slots.remove(sequence.slot)
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
        sequence.told = len(sequence.tokens)
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
        untold = sequence.tokens[sequence.told : sequence.computed]
        sequence.told = max(sequence.told, sequence.computed + sample)
        if sample:
            sequence.in_flight += 1
            self._usable_from[sequence.slot] = self._step + self.stages
        self._register(sequence)
        tokens = array("i", untold).tobytes() if untold else b""
        return Chunk(sequence.slot, start, length, sample, tuple(new_blocks), tokens)

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the sequence's prefix that the pool knows. The last token is always computed: its logits are needed."""
        if not self.prefix_cache or _computes_all(sequence):
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
        insort(self._free_slots, sequence.slot)
        sequence.slot = None
        sequence.blocks = []
        sequence.computed = sequence.registered = 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


def _scored(sequence: Sequence) -> bool:
    """Whether it asks for something of its prompt."""
    return sequence.params.prompt_logprobs is not None or sequence.params.pooling is not None


def _computes_all(sequence: Sequence) -> bool:
    """Whether what it asks for needs every position."""
    return sequence.params.prompt_logprobs is not None or sequence.params.pooling == "mean"


def _add_prompt_logprobs(sequence: Sequence, start: int, logprobs: PromptLogprobs) -> None:
    """Add what a chunk from `start` on gave, but for what is known from before a preemption."""
    known = sequence.prompt_logprobs
    chosen, tokens, values = array("f", logprobs.chosen), array("i", logprobs.top_tokens), array("f", logprobs.top_logprobs)
    for place in range(len(known) - start, len(chosen)):
        top = slice(place * logprobs.count, (place + 1) * logprobs.count)
        known.append(TokenLogprobs(chosen[place], tuple(tokens[top]), tuple(values[top])))
