from array import array
from collections import Counter, deque
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dashinfer.engine.media import MediaCache
from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.types import SamplingParams

from .fake_rank import FakeRank, continuation, show


def params(max_tokens: int, stop: tuple[int, ...] = ()) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=stop)


def new_sequence(
    prompt: list[int], max_tokens: int, stop: tuple[int, ...] = (), media: list[tuple[int, int]] | None = None
) -> Sequence:
    shown = None
    if media:
        prompt, shown = show(prompt, media)
    return Sequence(len(prompt), list(prompt), params(max_tokens, stop), shown)


class Harness:
    """A scheduler and a fake rank, with as many plans in flight as the engine keeps: two, or one more than stages."""

    def __init__(
        self,
        *,
        num_blocks=64,
        block_size=4,
        max_batch=4,
        max_step_tokens=16,
        prefix_cache=True,
        poison: int | None = None,
        media_tokens=8,
        stages=1,
    ) -> None:
        self.ahead = stages + 1
        self.media = MediaCache(capacity=3 * media_tokens, token_bytes=3)
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            prefix_cache=prefix_cache,
            media_cache=self.media,
            stages=stages,
        )
        self.rank = FakeRank(
            num_blocks=num_blocks,
            block_size=block_size,
            max_batch=max_batch,
            max_step_tokens=max_step_tokens,
            poison=poison,
            media_tokens=media_tokens,
            stages=stages,
        )
        self.results: deque = deque()
        self.plans: list = []
        self.endings: dict[Sequence, str] = {}

    def plan(self) -> bool:
        plan = self.scheduler.schedule()
        result = None if plan is None else self.rank.execute(plan)
        for message in self.media.take_messages():
            self.rank.tell(message)
        if plan is None or result is None:
            return False
        for enter in plan.enter:
            (sequence,) = (each for each in self.scheduler.running if each.slot == enter.slot)
            assert (enter.prompt_length, enter.sampling) == (sequence.prompt_length, sequence.params)
            assert list(array("i", enter.tokens)) == sequence.tokens
        self.plans.append(plan)
        self.results.append(result)
        return True

    def encode(self, count: int) -> bool:
        """Whether the rank encoded something."""
        keys = self.rank.encode(count)
        self.media.encoded(keys)
        return bool(keys)

    def apply(self) -> None:
        for update in self.scheduler.apply(self.results.popleft()):
            assert update.sequence not in self.endings, "an ended sequence gained a token"
            if update.finish or update.failed:
                self.endings[update.sequence] = update.finish or "failed"

    def run(self, limit: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(limit):
            while len(self.results) < self.ahead and self.plan():
                pass
            if self.results:
                self.apply()
            elif not self.encode(1):
                return
        raise AssertionError("the scheduler makes no progress")

    def assert_empty(self) -> None:
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.scheduler.pool.num_used == 0
        assert self.scheduler.num_free_slots == self.scheduler.max_batch
        assert self.media.num_pinned == 0


def test_one_sequence_gets_the_tokens_of_the_model():
    harness = Harness()
    sequence = new_sequence([1, 2, 3], 10)
    harness.scheduler.add(sequence)
    harness.run()

    assert sequence.tokens[3:] == continuation([1, 2, 3], sequence.params)
    assert harness.endings == {sequence: "length"}
    harness.assert_empty()


def test_nothing_to_do_is_no_plan():
    assert Harness().scheduler.schedule() is None


def test_a_stop_token_ends_a_sequence_and_drops_what_was_planned_ahead():
    prompt = [5, 6]
    undisturbed = continuation(prompt, params(20))
    stop = undisturbed[4]
    harness = Harness()
    sequence = new_sequence(prompt, 20, (stop,))
    harness.scheduler.add(sequence)
    harness.run()

    assert sequence.tokens[2:] == undisturbed[: undisturbed.index(stop) + 1]
    assert harness.endings == {sequence: "stop"}
    harness.assert_empty()


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    harness = Harness(max_step_tokens=8, max_batch=2)
    short, long = new_sequence([1], 12), new_sequence(list(range(20)), 2)
    harness.scheduler.add(short)
    harness.plan()
    harness.scheduler.add(long)
    harness.plan()
    plan = harness.plans[-1]

    assert [(chunk.slot, chunk.length) for chunk in plan.chunks] == [(0, 1), (1, 7)]
    harness.run()
    assert short.tokens[1:] == continuation([1], short.params)
    assert long.tokens[20:] == continuation(list(range(20)), long.params)


def test_first_in_first_served():
    harness = Harness(max_batch=1)
    sequences = [new_sequence([n], 3) for n in range(4)]
    for sequence in sequences:
        harness.scheduler.add(sequence)
    harness.run()

    assert list(harness.endings) == sequences


def test_a_head_of_the_queue_that_does_not_fit_is_not_overtaken():
    harness = Harness(num_blocks=4, block_size=4, max_batch=4)
    running, large, small = new_sequence([1] * 7, 5), new_sequence([2] * 12, 4), new_sequence([3], 2)
    for sequence in (running, large, small):
        harness.scheduler.add(sequence)
    harness.plan()

    assert harness.scheduler.running == [running]
    harness.run()
    assert next(iter(harness.endings)) is running
    harness.assert_empty()


def test_a_second_prompt_takes_the_cached_prefix():
    prompt = list(range(11))
    harness = Harness()
    first, second = new_sequence(prompt, 4), new_sequence(prompt, 4)
    harness.scheduler.add(first)
    harness.run()
    harness.scheduler.add(second)
    harness.run()

    assert (first.cached_tokens, second.cached_tokens) == (0, 8)
    assert second.tokens == first.tokens


def test_choices_of_one_prompt_share_it_within_the_same_step():
    prompt = list(range(11))
    harness = Harness(max_step_tokens=32)
    sequences = [new_sequence(prompt, 4) for _ in range(3)]
    for sequence in sequences:
        harness.scheduler.add(sequence)
    harness.plan()

    assert [chunk.length for chunk in harness.plans[0].chunks] == [11, 3, 3]
    harness.run()
    assert all(sequence.tokens[11:] == continuation(prompt, sequence.params) for sequence in sequences)


def test_the_last_prompt_token_is_always_computed():
    prompt = list(range(8))  # two full blocks
    harness = Harness()
    for _ in range(2):
        harness.scheduler.add(new_sequence(prompt, 1))
        harness.run()

    assert [chunk.length for plan in harness.plans for chunk in plan.chunks] == [8, 4]


def test_without_the_prefix_cache_everything_is_computed():
    prompt = list(range(11))
    harness = Harness(prefix_cache=False)
    for _ in range(2):
        harness.scheduler.add(new_sequence(prompt, 2))
        harness.run()

    assert [chunk.length for plan in harness.plans for chunk in plan.chunks] == [11, 1, 11, 1]


def test_preemption_loses_no_token():
    harness = Harness(num_blocks=6, block_size=2, max_batch=3, max_step_tokens=8)
    sequences = [new_sequence([n, n], 9) for n in range(3)]
    for sequence in sequences:
        harness.scheduler.add(sequence)
    harness.run()

    assert harness.scheduler.preemptions > 0
    for sequence in sequences:
        assert sequence.tokens[2:] == continuation(sequence.tokens[:2], sequence.params)
    harness.assert_empty()


def test_a_preempted_sequence_enters_again_with_its_output():
    harness = Harness(num_blocks=6, block_size=2, max_batch=2, max_step_tokens=16, prefix_cache=False)
    for n in range(2):
        harness.scheduler.add(new_sequence([n, n], 9))
    harness.run()
    again = [enter for plan in harness.plans for enter in plan.enter][2]

    assert len(array("i", again.tokens)) > again.prompt_length == 2


@pytest.mark.parametrize("plans_before", range(6))
def test_an_abort_frees_everything_at_once(plans_before):
    harness = Harness()
    sequence = new_sequence(list(range(10)), 10)
    harness.scheduler.add(sequence)
    for _ in range(plans_before):
        if len(harness.results) == 2:
            harness.apply()
        harness.plan()
    harness.scheduler.abort(sequence)

    harness.assert_empty()
    harness.run()
    assert harness.endings == {}
    harness.scheduler.abort(sequence)  # once more changes nothing
    harness.assert_empty()


def test_a_sequence_that_the_model_fails_ends_alone():
    prompts = [[n] for n in range(6)]
    poison = continuation([0], params(10))[4]
    harness = Harness(poison=poison)
    sequences = [new_sequence(prompt, 10) for prompt in prompts]
    for sequence in sequences:
        harness.scheduler.add(sequence)
    harness.run()

    expected = {}
    for sequence in sequences:
        undisturbed = continuation(sequence.tokens[:1], sequence.params)
        fails = poison in undisturbed[:-1]  # nothing is computed after the last one
        expected[sequence] = "failed" if fails else "length"
        assert sequence.tokens[1:] == (undisturbed[: undisturbed.index(poison) + 1] if fails else undisturbed)
    assert harness.endings == expected
    assert set(expected.values()) == {"failed", "length"}
    harness.assert_empty()


def test_what_is_stuck_cannot_start_in_the_next_plan():
    harness = Harness(num_blocks=8, block_size=4, max_batch=4, max_step_tokens=64)
    first, large, small, smallest = (new_sequence([n] * length, 4) for n, length in enumerate([8, 20, 4, 2]))
    for sequence in (first, large, small, smallest):
        harness.scheduler.add(sequence)

    assert harness.scheduler.stuck() == [small, smallest]  # 2 + 5 blocks, one more kept for each that runs
    harness.plan()
    assert harness.scheduler.running == [first, large]
    assert harness.scheduler.stuck() == [small, smallest]
    harness.scheduler.abort(large)
    assert harness.scheduler.stuck() == []


def test_what_runs_is_computed_again_after_the_ranks_are_lost():
    harness = Harness(max_batch=2, max_step_tokens=16)
    sequences = [new_sequence([*range(8), n], 6) for n in range(3)]
    for sequence in sequences:
        harness.scheduler.add(sequence)
    for _ in range(3):
        harness.plan()
        harness.apply()
    harness.plan()
    harness.plan()

    assert harness.scheduler.recover() == sequences[:2]
    assert list(harness.scheduler.waiting) == sequences
    assert (harness.scheduler.pool.num_available, harness.scheduler.num_free_slots) == (64, 2)
    harness.results.clear()
    harness.rank.reset()
    harness.run()
    assert [sequence.cached_tokens for sequence in sequences] == [0, 8, 8]  # as they entered first
    for sequence in sequences:
        assert sequence.tokens[9:] == continuation(sequence.tokens[:9], sequence.params)
    harness.assert_empty()


def test_an_ended_sequence_is_not_lost_with_the_ranks():
    harness = Harness()
    sequence = new_sequence([1, 2], 6)
    harness.scheduler.add(sequence)
    harness.plan()
    harness.scheduler.abort(sequence)

    assert harness.scheduler.recover() == []
    harness.assert_empty()


def test_one_is_computed_alone():
    harness = Harness(max_step_tokens=32)
    sequences = [new_sequence([n] * 6, 6) for n in range(4)]
    for sequence in sequences[:3]:
        harness.scheduler.add(sequence)
    harness.plan()
    harness.apply()
    harness.scheduler.isolate(sequences[1])
    harness.scheduler.add(sequences[3])
    for _ in range(3):
        harness.plan()
        harness.apply()

    assert harness.scheduler.running == [sequences[1]]
    assert harness.scheduler.stuck() == [sequences[0], sequences[2], sequences[3]]
    assert [sequence.num_output for sequence in sequences] == [1, 4, 1, 0]
    harness.scheduler.isolate(None)
    assert harness.scheduler.stuck() == []
    harness.run()
    for sequence in sequences:
        assert sequence.tokens[6:] == continuation(sequence.tokens[:6], sequence.params)
    harness.assert_empty()


def test_no_more_run_than_may():
    harness = Harness()
    harness.scheduler.max_running = 2
    for n in range(4):
        harness.scheduler.add(new_sequence([n], 3))
    harness.plan()

    assert len(harness.scheduler.running) == 2
    assert len(harness.scheduler.stuck()) == 2
    harness.run()
    harness.assert_empty()


SHARED = [0, 1, 2, 3]  # most prompts begin alike
requests = st.tuples(
    st.one_of(
        st.integers(6, 14).map(lambda length: (SHARED * 4)[:length]),
        st.lists(st.integers(0, 3), min_size=1, max_size=14),
    ),
    st.integers(1, 10),
    st.sets(st.integers(0, 49), max_size=8),
    st.one_of(st.just([]), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=3)),
)
actions = st.lists(
    st.one_of(
        requests,
        st.just("plan"),
        st.just("apply"),
        st.just("encode"),
        st.tuples(st.just("abort"), st.integers(0, 30)),
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(
    actions=actions,
    num_blocks=st.integers(20, 28),
    block_size=st.sampled_from([2, 4]),
    media_tokens=st.integers(1, 9),
    max_batch=st.integers(1, 5),
    spare_tokens=st.integers(0, 20),
    prefix_cache=st.booleans(),
)
def test_any_course_of_events(actions, num_blocks, block_size, media_tokens, max_batch, spare_tokens, prefix_cache):
    """Arrivals, aborts and preemptions in any order: every request ends once with the model's tokens, and nothing leaks."""
    harness = Harness(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch=max_batch,
        max_step_tokens=max_batch + spare_tokens,
        prefix_cache=prefix_cache,
        media_tokens=media_tokens,
    )
    preemptions, hits = play(harness, actions)
    event(f"preemptions: {preemptions > 0}")
    event(f"prefix hits: {hits > 0}")
    event(f"media evicted: {harness.media.misses > 5}")


def test_room_that_a_later_sequence_gives_up_in_the_same_plan_is_found():
    """Both have shown the small image, and wait for one that fills the cache: no event follows that would have them planned."""
    harness = Harness(num_blocks=20, block_size=2, max_batch=2, max_step_tokens=2, prefix_cache=False, media_tokens=1)
    prompt = (SHARED * 4)[:6]
    shown = [(0, 0), (0, 1), (1, 0)], [(1, 0), (1, 1)]
    play(harness, [*[(prompt, 1, set(), [])] * 8, *[(prompt, 1, set(), media) for media in shown]])


def test_an_image_that_comes_again_does_not_keep_the_room_of_one_before_it():
    harness = Harness(num_blocks=60, block_size=2, max_batch=4, max_step_tokens=8, prefix_cache=False, media_tokens=1)
    prompt = list(range(6))
    play(harness, [(prompt, 1, set(), [(0, 2), (1, 1), (2, 2), (5, 2)]), (prompt, 1, set(), [(3, 2), (4, 1)])])


def test_the_courses_of_events_include_preemptions_and_prefix_hits():
    """The same checks under random events that are known to bring both, alone and together."""
    random = Random(0)
    seen = Counter()
    for _ in range(60):
        harness = Harness(num_blocks=14, block_size=2, max_batch=5, max_step_tokens=16, media_tokens=4)
        actions: list = []
        for _ in range(40):
            kind = random.random()
            if kind < 0.3:
                media = [(random.randrange(8), random.randrange(4))] if kind < 0.15 else []
                prompt = [random.randrange(2) for _ in range(random.randint(1, 12))]
                actions.append((prompt, random.randint(1, 10), set(), media))
            elif kind < 0.9:
                actions.append("plan" if kind < 0.55 else "apply" if kind < 0.85 else "encode")
            else:
                actions.append(("abort", random.randrange(10)))
        preemptions, hits = play(harness, actions)
        seen[preemptions > 0, hits > 0] += 1
        seen["media"] += harness.media.misses > 3 and harness.media.hits > 0

    assert seen[True, True] > 5
    assert seen["media"] > 5


def play(harness: Harness, actions: list) -> tuple[int, int]:
    """Let the actions happen, then finish what is left, and check everything.

    Returns:
        How often a sequence was preempted, and how many sequences took a prefix from the cache.
    """
    sequences: list[Sequence] = []
    aborted: set[Sequence] = set()
    for action in actions:
        match action:
            case "plan":
                if len(harness.results) < harness.ahead:
                    harness.plan()
            case "apply":
                if harness.results:
                    harness.apply()
            case "encode":
                harness.encode(1)
            case ("abort", number):
                if number < len(sequences) and not sequences[number].ended:
                    aborted.add(sequences[number])
                    harness.scheduler.abort(sequences[number])
            case (prompt, max_tokens, stop, media):
                sequences.append(new_sequence(prompt, max_tokens, tuple(stop), media))
                harness.scheduler.add(sequences[-1])
        holders = [block for sequence in harness.scheduler.running for block in set(sequence.blocks)]
        assert harness.scheduler.pool.num_used == len(set(holders))
        assert len(harness.scheduler.running) <= harness.scheduler.max_batch
    harness.run()

    harness.assert_empty()
    assert set(harness.endings) == set(sequences) - aborted
    for sequence in harness.endings:
        prompt = sequence.tokens[: sequence.prompt_length]
        assert sequence.tokens[sequence.prompt_length :] == continuation(prompt, sequence.params, sequence.media)
    return harness.scheduler.preemptions, sum(sequence.cached_tokens > 0 for sequence in sequences)
