"""Plans for a pipeline: the fake rank has a token only M plans after the one that sampled it, as its first stage."""

from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest
import trio
from hypothesis import event, given, settings
from hypothesis import strategies as st

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine
from dashinfer.types import ModelFiles, Ready, SamplingParams, StepPlan

from .fake_rank import FakeRank, continuation
from .test_recovery_histories import History, geometries, quiet, some_arrivals, some_faults  # noqa: F401
from .test_scheduler import Harness, actions, new_sequence, play


def decodes(plan: StepPlan) -> int:
    return sum(chunk.length == 1 and chunk.sample for chunk in plan.chunks)


def assert_guarantee(plans: list[StepPlan], stages: int) -> None:
    """What plan j samples in a slot, no plan before j + M uses that slot."""
    usable_from: dict[int, int] = {}
    previous = -1
    for plan in plans:
        assert plan.step > previous
        previous = plan.step
        for slot in [*(enter.slot for enter in plan.enter), *(chunk.slot for chunk in plan.chunks)]:
            assert plan.step >= usable_from.get(slot, 0)
        usable_from |= {chunk.slot: plan.step + stages for chunk in plan.chunks if chunk.sample}


@settings(max_examples=250, deadline=None)
@given(
    stages=st.integers(2, 4),
    actions=actions,
    num_blocks=st.integers(20, 28),
    block_size=st.sampled_from([2, 4]),
    media_tokens=st.integers(1, 9),
    max_batch=st.integers(1, 7),
    spare_tokens=st.integers(0, 20),
    prefix_cache=st.booleans(),
)
def test_any_course_of_events(stages, actions, num_blocks, block_size, media_tokens, max_batch, spare_tokens, prefix_cache):
    """As without a pipeline, and no token is needed before it is there."""
    harness = Harness(
        num_blocks=num_blocks,
        block_size=block_size,
        max_batch=max_batch,
        max_step_tokens=max_batch + spare_tokens,
        prefix_cache=prefix_cache,
        media_tokens=media_tokens,
        stages=stages,
    )
    preemptions, hits = play(harness, actions)
    assert_guarantee(harness.plans, stages)
    event(f"preemptions: {preemptions > 0}")
    event(f"prefix hits: {hits > 0}")
    event(f"numbers left out: {harness.scheduler.next_step > len(harness.plans)}")


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_same_with_many_preemptions(stages):
    random = Random(stages)
    seen = Counter()
    for _ in range(40):
        harness = Harness(num_blocks=14, block_size=2, max_batch=5, max_step_tokens=16, media_tokens=4, stages=stages)
        actions: list = []
        for _ in range(50):
            kind = random.random()
            if kind < 0.3:
                media = [(random.randrange(8), random.randrange(4))] if kind < 0.1 else []
                prompt = [random.randrange(2) for _ in range(random.randint(1, 12))]
                actions.append((prompt, random.randint(1, 10), set(), media))
            elif kind < 0.95:
                actions.append("plan" if kind < 0.6 else "apply" if kind < 0.9 else "encode")
            else:
                actions.append(("abort", random.randrange(10)))
        preemptions, hits = play(harness, actions)
        assert_guarantee(harness.plans, stages)
        seen[preemptions > 0, hits > 0] += 1

    assert seen[True, True] > 5


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_single_sequence_leaves_numbers_out(stages):
    harness = Harness(stages=stages)
    sequence = new_sequence([1, 2, 3], 5)
    harness.scheduler.add(sequence)
    while harness.plan():
        pass

    # as without a pipeline: one plan that runs, one that follows without a word from the parent
    assert [plan.step for plan in harness.plans] == [0, stages]
    harness.run()
    assert [plan.step for plan in harness.plans] == [number * stages for number in range(5)]
    assert sequence.tokens[3:] == continuation([1, 2, 3], sequence.params)
    harness.assert_empty()


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("count", range(1, 12))
def test_sequences_that_arrive_together_are_split_evenly(stages, count):
    harness = Harness(stages=stages, max_batch=12, num_blocks=200, max_step_tokens=64)
    for number in range(count):
        harness.scheduler.add(new_sequence([number], 20))
    harness.run()
    sizes = dict.fromkeys(range(stages * 19), 0) | {plan.step: len(plan.chunks) for plan in harness.plans}

    for begin in range(stages * 18):
        window = [sizes[begin + offset] for offset in range(stages)]
        assert sum(window) == count
        assert max(window) - min(window) <= 1


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_the_split_becomes_even_again_after_some_have_ended(stages):
    harness = Harness(stages=stages, max_batch=16, num_blocks=400, max_step_tokens=64)
    sequences = [new_sequence([number], 60) for number in range(16)]
    for sequence in sequences:
        harness.scheduler.add(sequence)
    for _ in range(10):
        while len(harness.results) < harness.ahead and harness.plan():
            pass
        harness.apply()
    in_one_plan = {chunk.slot for chunk in harness.plans[-1].chunks}
    others = [sequence for sequence in sequences if sequence.slot not in in_one_plan]
    for sequence in others[: 9 - len(in_one_plan)]:
        harness.scheduler.abort(sequence)
    left = sum(not sequence.ended for sequence in sequences)
    before = len(harness.plans)
    harness.run()
    sizes = [decodes(plan) for plan in harness.plans[before + 2 * stages : before + 20 * stages]]

    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes[:stages]) == left


@pytest.mark.parametrize("stages", [2, 4])
def test_chunks_of_a_prompt_follow_each_other_without_a_gap(stages):
    harness = Harness(stages=stages, max_step_tokens=8, max_batch=8)
    harness.scheduler.add(new_sequence(list(range(30)), 2))
    harness.run()

    assert [(plan.step, plan.chunks[0].length) for plan in harness.plans[:4]] == [(0, 8), (1, 8), (2, 8), (3, 6)]
    assert [plan.step for plan in harness.plans[4:]] == [3 + stages]


def test_a_prompt_is_computed_beside_all_groups_of_decodes():
    harness = Harness(stages=2, max_step_tokens=12, max_batch=5, num_blocks=100)
    for number in range(4):
        harness.scheduler.add(new_sequence([number], 40))
    for _ in range(6):
        while len(harness.results) < harness.ahead and harness.plan():
            pass
        harness.apply()
    before = len(harness.plans)
    harness.scheduler.add(new_sequence(list(range(45)), 2))
    harness.run()

    lengths = [[chunk.length for chunk in plan.chunks] for plan in harness.plans[before : before + 6]]
    assert lengths == [[1, 1, 10], [1, 1, 10], [1, 1, 10], [1, 1, 10], [1, 1, 5], [1, 1]]


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_nobody_is_passed_over_for_long(stages):
    """Under arrivals and aborts without end, a sequence that could be computed is within two rounds of the pipeline."""
    random = Random(stages)
    harness = Harness(stages=stages, max_batch=9, num_blocks=1000, max_step_tokens=24)
    sequences = []
    idle: dict = {}  # sequence -> plans since it could be computed
    longest = 0
    for _ in range(1500):
        if random.random() < 0.15:
            prompt = [random.randrange(50) for _ in range(random.choice([1, 2, 30]))]
            sequences.append(new_sequence(prompt, random.choice([2, 10, 40])))
            harness.scheduler.add(sequences[-1])
        if harness.scheduler.running and random.random() < 0.03:
            harness.scheduler.abort(random.choice(harness.scheduler.running))
        if len(harness.results) < harness.ahead and harness.plan():
            planned = {chunk.slot for chunk in harness.plans[-1].chunks}
            for sequence in harness.scheduler.running:
                decoding = sequence.num_output > 0 and sequence.num_to_compute
                idle[sequence] = 0 if sequence.slot in planned or not decoding else idle.get(sequence, 0) + 1
                longest = max(longest, idle[sequence])
        if harness.results and (len(harness.results) == harness.ahead or random.random() < 0.4):
            harness.apply()
    harness.run()
    assert_guarantee(harness.plans, stages)
    harness.assert_empty()

    assert len(sequences) > 100
    assert stages - 1 <= longest < 2 * stages


class TimedPipeline:
    """In the place of the worker group: a plan takes each stage a second a token, on the test's clock, and waits at the first
    for the tokens of the plans M before it. `sent` has (time, plan); `busy` the seconds of each stage; `starts` how many
    plans came when there was nothing to do."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.sent: list = []
        self.busy = [0.0] * stages
        self.starts = 0
        self._queues = [trio.open_memory_channel(stages + 1) for _ in range(stages)]
        self._underway: set[int] = set()
        self._done = trio.Event()

    async def run(self, *, on_progress, on_result, on_encoded, on_memory, task_status) -> None:
        rank = FakeRank(num_blocks=64, block_size=4, max_batch=8, max_step_tokens=32, stages=self.stages)

        async def stage(number: int) -> None:
            async for plan in self._queues[number][1]:
                while number == 0 and min(self._underway) <= plan.step - self.stages:
                    await self._done.wait()
                seconds = sum(chunk.length for chunk in plan.chunks)
                await trio.sleep(seconds)
                self.busy[number] += seconds
                if number + 1 < self.stages:
                    await self._queues[number + 1][0].send(plan)
                    continue
                on_result(rank.execute(plan))
                self._underway.remove(plan.step)
                self._done.set()
                self._done = trio.Event()

        async with trio.open_nursery() as nursery:
            for number in range(self.stages):
                nursery.start_soon(stage, number)
            task_status.started(Ready("F", "llm", "cpu", "float32", 50, 64, 32, 4, 64, 0, 0))

    async def send(self, plan: StepPlan) -> None:
        self.sent.append((trio.current_time(), plan))
        self.starts += not self._underway
        self._underway.add(plan.step)
        await self._queues[0][0].send(plan)


@asynccontextmanager
async def running(stages: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ServerConfig, "__post_init__", lambda self: None)
    workers = TimedPipeline(stages)
    config = ServerConfig(model="m", max_batch=8, pipeline_parallel=stages)
    engine = Engine(config, ModelFiles("m", "safetensors", (), {}), make_workers=lambda configs: workers)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield engine, workers
        nursery.cancel_scope.cancel()


async def request(engine: Engine, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, seed=0)
    tokens = []
    with engine.submit(prompt, [params]) as generation:
        while outputs := await generation.receive():
            tokens += [output.token for output in outputs]
    assert tokens == continuation(prompt, params)


@pytest.mark.parametrize("stages", [2, 4])
async def test_all_stages_are_busy(stages, autojump_clock, monkeypatch):
    async with running(stages, monkeypatch) as (engine, workers):
        start = trio.current_time()
        async with trio.open_nursery() as requests:
            for number in range(8):
                requests.start_soon(request, engine, [number], 20)
        took = trio.current_time() - start

    assert workers.busy == [8 * 20] * stages
    assert workers.starts == 1
    assert took <= 1.06 * 8 * 20


async def test_a_single_sequence_never_waits_for_the_parent(autojump_clock, monkeypatch):
    async with running(2, monkeypatch) as (engine, workers):
        start = trio.current_time()
        await request(engine, [1] * 20, 20)

        assert trio.current_time() - start == pytest.approx(2 * (20 + 19))
        assert workers.starts == 1


async def test_what_arrives_while_all_stages_work_is_in_the_next_plan(autojump_clock, monkeypatch):
    async with running(2, monkeypatch) as (engine, workers):
        start = trio.current_time()
        async with trio.open_nursery() as requests:
            for number in range(2):  # what steps take becomes known
                requests.start_soon(request, engine, [number] * 20, 2)
            for number, arrival in [(10, 200), (11, 200), (12, 207), (13, 215)]:
                await trio.sleep_until(start + arrival)
                requests.start_soon(request, engine, [number] * 16, 2)

    entered = [(time - start, plan.step) for time, plan in workers.sent for _ in plan.enter]
    # Two plans are made at once, one for each stage; the third in good time before the first has its result, after 32 s.
    assert entered[2][0] == entered[3][0] == 200
    assert entered[2][1] + 1 == entered[3][1]
    assert 215 < entered[4][0] <= entered[5][0] <= 232


@settings(max_examples=100, deadline=None)
@given(stages=st.integers(2, 3), arrivals=some_arrivals, faults=some_faults, geometry=geometries)
def test_nothing_is_lost_or_doubled_when_ranks_fail(stages, arrivals, faults, geometry):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServerConfig, "__post_init__", lambda self: None)
        history = History(arrivals, faults, replace(geometry, resets=False), pipeline_parallel=stages)
    history.chaos.rank = {**history.chaos.rank, "stages": stages}
    history.play()

    assert history.error is None
    event(f"failures: {min(len(history.chaos.configs) - 1, 4)}")
