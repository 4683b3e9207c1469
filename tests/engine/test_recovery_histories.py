"""Any history of arrivals, departures and failures: every request ends once, and what it got is the undisturbed run's.

Ranks are fakes that fail at any message boundary; time jumps, so that backoff and deadlines cost nothing.
"""

import logging
from collections import deque
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine
from dashinfer.errors import InternalError, WorkerError
from dashinfer.types import ModelFiles, Ready, SamplingParams
from dashinfer.worker.supervisor import one_error

from .fake_rank import continuation, show
from .fake_workers import Chaos

pytestmark = pytest.mark.feature("Parallelism and recovery", "Streams outlive dead and hanging workers")

FILES = ModelFiles("fake", "safetensors", (), {})
MAX_LENGTH = 28
SHARED = [0, 1, 2, 3] * 2  # most prompts begin alike
NEVER = 1000
END = 100_000.0  # seconds: a history that takes longer has come to a halt


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logger = logging.getLogger("dashinfer.engine")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


@dataclass(frozen=True)
class Arrival:
    """A request, which leaves after `patience` seconds or once it has `enough` tokens, and stops its first choice at
    `stop_first` tokens of that. Computing the position `poison` kills ranks."""

    prompt: list[int]
    max_tokens: int
    at: int = 0
    choices: int = 1
    stop: tuple[int, ...] = ()
    media: tuple[tuple[int, int], ...] = ()
    patience: float = END
    enough: int = NEVER
    stop_first: int = NEVER
    poison: int | None = None


@dataclass(frozen=True)
class Geometry:
    num_blocks: int = 20
    block_size: int = 2
    max_batch: int = 4
    spare_tokens: int = 8
    media_tokens: int = 4
    prefix_cache: bool = True
    memory: int = NEVER  # tokens beyond a block that there is memory for in a step
    resets: bool = True


@dataclass
class Outcome:
    """What a request got, and how it ended."""

    tokens: list[list[int]]
    finished: set[int] = field(default_factory=set)
    stopped: bool = False  # the first choice
    endings: list[str] = field(default_factory=list)
    why: str = ""


def seed(request: int, choice: int) -> int:
    return 10 * request + choice


class History:
    """An engine, its failing ranks and its requests, until all have ended."""

    def __init__(self, arrivals: list[Arrival], faults=(), geometry: Geometry | None = None, *, sick=(), **config) -> None:
        geometry = geometry or Geometry()
        self.arrivals = arrivals
        self.prompts = [show(each.prompt, list(each.media)) if each.media else (each.prompt, None) for each in arrivals]
        self.params = [
            [SamplingParams(max_tokens=each.max_tokens, seed=seed(n, c), stop_token_ids=each.stop) for c in range(each.choices)]
            for n, each in enumerate(arrivals)
        ]
        self.outcomes = [Outcome([[] for _ in range(each.choices)]) for each in arrivals]
        self.error: WorkerError | None = None
        tokens = geometry.max_batch + geometry.spare_tokens
        sizes = {"num_blocks": geometry.num_blocks, "block_size": geometry.block_size, "max_step_tokens": tokens}
        every = [(number, params.seed) for number, choices in enumerate(self.params) for params in choices]
        self.chaos = Chaos(
            rank={**sizes, "max_batch": geometry.max_batch, "media_tokens": geometry.media_tokens},
            ready=Ready(
                *("F", "vlm", "cpu", "float32", 100, MAX_LENGTH),
                **sizes,
                weight_bytes=0,
                kv_cache_bytes=0,
                media_cache_bytes=3 * geometry.media_tokens,
                media_token_bytes=3,
            ),
            faults=deque(faults),
            poison={seed: poison for n, seed in every if (poison := arrivals[n].poison) is not None},
            sick=sick,
            shows={seed: [each.key for each in media.media] for n, seed in every if (media := self.prompts[n][1])},
            memory=geometry.block_size + geometry.memory,
            resets=geometry.resets,
        )
        config = {"max_restarts": 100, "restart_window": 60.0, **config}
        batch = {"max_batch": geometry.max_batch, "max_queue": NEVER, "disable_prefix_cache": not geometry.prefix_cache}
        settings = ServerConfig(model="fake", step_timeout=10.0, **batch, **config)
        self.engine = Engine(settings, FILES, make_workers=self.chaos.make_workers)

    def play(self) -> "History":
        try:
            trio.run(self._run, clock=MockClock(autojump_threshold=0))
        except WorkerError as error:
            self.error = error
        assert self.chaos.group is not None
        self.chaos.group.blame()
        self._check()
        return self

    async def _run(self) -> None:
        with trio.fail_after(END), one_error():
            async with trio.open_nursery() as nursery:
                await nursery.start(self.engine.run)
                async with trio.open_nursery() as clients:
                    clients.cancel_scope.shield = True  # the engine's end is told to them
                    for number in range(len(self.arrivals)):
                        clients.start_soon(self._request, number)
                await self.engine.drained()
                nursery.cancel_scope.cancel()

    async def _request(self, number: int) -> None:
        arrival, outcome = self.arrivals[number], self.outcomes[number]
        await trio.sleep(arrival.at)
        with trio.move_on_after(arrival.patience) as patience:
            try:
                outcome.endings.append(await self._read(number))
            except InternalError as error:
                outcome.endings.append("failed")
                outcome.why = str(error)
        if patience.cancelled_caught:
            outcome.endings.append("left")

    async def _read(self, number: int) -> str:
        arrival, outcome, (prompt, media) = self.arrivals[number], self.outcomes[number], self.prompts[number]
        if self.engine.state == "failed":
            return "refused"
        with self.engine.submit(prompt, self.params[number], media) as generation:
            while outputs := await generation.receive():
                for output in outputs:
                    assert output.index not in outcome.finished
                    assert not (outcome.stopped and output.index == 0)
                    outcome.tokens[output.index].append(output.token)
                    if output.finish:
                        outcome.finished.add(output.index)
                if len(outcome.tokens[0]) >= arrival.stop_first and not outcome.stopped and 0 not in outcome.finished:
                    outcome.stopped = True
                    generation.stop(0)
                if sum(map(len, outcome.tokens)) >= arrival.enough:
                    return "left"
        return "finished"

    def _check(self) -> None:
        for number, outcome in enumerate(self.outcomes):
            prompt, media = self.prompts[number]
            (ending,) = outcome.endings
            for index, (params, tokens) in enumerate(zip(self.params[number], outcome.tokens, strict=True)):
                expected = continuation(prompt, params, media)
                whole = index in outcome.finished
                assert tokens == (expected if whole else expected[: len(tokens)])
                assert whole or ending != "finished" or (outcome.stopped and index == 0)
            if ending == "failed" and self.error is None and "too often" not in outcome.why:
                assert self.chaos.guilty & {params.seed for params in self.params[number]}, outcome.why
        assert len(self.chaos.configs) - 1 <= self.chaos.causes
        assert max(self.chaos.kills.values(), default=0) <= 5  # two in company, three alone
        scheduler, cache = self.engine._scheduler, self.engine._media_cache
        assert not scheduler.running and not scheduler.waiting and not self.engine._groups
        assert (scheduler.pool.num_used, scheduler.num_free_slots) == (0, scheduler.max_batch)
        assert cache.num_pinned == 0 and not any(entry.wants for entry in cache._entries.values())
        assert self.engine._recovery.suspect() is None and not self.engine._recovery._strikes

    @property
    def endings(self) -> list[str]:
        return [ending for outcome in self.outcomes for ending in outcome.endings]


def rarely(strategy: st.SearchStrategy, otherwise: object) -> st.SearchStrategy:
    return st.one_of(st.just(otherwise), st.just(otherwise), strategy)


some_arrivals = st.lists(
    st.builds(
        Arrival,
        prompt=st.one_of(
            st.integers(1, 8).map(lambda length: SHARED[:length]),
            st.lists(st.integers(0, 3), min_size=1, max_size=8),
        ),
        max_tokens=st.one_of(st.integers(1, 12), st.just(12)),
        at=st.one_of(st.just(0), st.just(0), st.integers(0, 3), st.integers(0, 40)),
        choices=rarely(st.integers(2, 3), 1),
        stop=st.lists(st.integers(0, 49), max_size=2).map(tuple),
        media=rarely(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=2).map(tuple), ()),
        patience=rarely(st.integers(1, 60).map(float), END),
        enough=rarely(st.integers(0, 6), NEVER),
        stop_first=rarely(st.integers(1, 4), NEVER),
        poison=rarely(st.integers(0, 16), None),
    ),
    min_size=2,
    max_size=7,
)
manners = st.sampled_from(["die", "die", "die", "hang", "refuse", "memory", "exhaust"])
some_faults = st.lists(st.tuples(st.one_of(st.integers(0, 12), st.integers(2, 60)), manners), max_size=8).map(
    lambda faults: [(max(after, 2) if index == 0 else after, manner) for index, (after, manner) in enumerate(faults)]
)
geometries = st.builds(
    Geometry,
    num_blocks=st.one_of(st.just(14), st.integers(14, 24)),
    block_size=st.sampled_from([2, 2, 4]),
    max_batch=st.sampled_from([4, 4, 3, 2, 1]),
    spare_tokens=st.integers(0, 12),
    media_tokens=st.integers(1, 6),
    prefix_cache=st.booleans(),
    memory=rarely(st.integers(0, 6), NEVER),
    resets=st.booleans(),
)


@settings(max_examples=2000, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
@given(arrivals=some_arrivals, faults=some_faults, geometry=geometries)
def test_nothing_is_lost_or_doubled_in_any_history(arrivals, faults, geometry):
    history = History(arrivals, faults, geometry).play()

    assert history.error is None
    event(f"failures: {min(len(history.chaos.configs) - 1, 4)}")
    for ending in set(history.endings):
        event(f"some {ending}")
    event(f"preemptions: {history.engine._scheduler.preemptions > 0}")


some_crashes = st.lists(st.tuples(st.integers(0, 8), manners), min_size=2, max_size=14).map(
    lambda faults: [(max(after, 2) if index == 0 else after, manner) for index, (after, manner) in enumerate(faults)]
)


@settings(max_examples=100, deadline=None)
@given(
    arrivals=some_arrivals,
    faults=some_crashes,
    geometry=geometries,
    max_restarts=st.integers(0, 4),
    window=st.sampled_from([1.0, 20.0, 1000.0]),
)
def test_a_server_that_gives_up_tells_every_request(arrivals, faults, geometry, max_restarts, window):
    history = History(arrivals, faults, geometry, max_restarts=max_restarts, restart_window=window).play()

    event(f"given up: {history.error is not None}")
    event(f"victims: {any('too often' in outcome.why for outcome in history.outcomes)}")


@pytest.mark.parametrize("manner", ["die", "hang", "memory"])
def test_every_boundary_of_one_history(manner):
    arrivals = [
        Arrival(SHARED, 12),
        Arrival(SHARED, 4, at=1, choices=2),
        Arrival([3], 6, at=2, media=((0, 1), (1, 2))),
        Arrival([2], 3, at=2, media=((1, 1),)),
        Arrival([1], 9, at=4, enough=3),
    ]
    boundaries, restarts = 0, 1
    while restarts:
        history = History(arrivals, [(2 + boundaries, manner)], Geometry(num_blocks=16)).play()
        assert history.endings == ["finished"] * 4 + ["left"]
        boundaries += 1
        restarts = len(history.chaos.configs) - 1

    assert boundaries > 50


def test_a_request_that_always_kills_costs_five_restarts_and_nobody_else():
    arrivals = [Arrival([number], 10, at=number % 3, poison=6 if number == 2 else None) for number in range(4)]
    history = History(arrivals, max_restarts=8).play()

    assert history.endings == ["finished", "finished", "failed", "finished"]
    assert history.outcomes[2].tokens == [continuation([2], history.params[2][0])[:6]]
    assert len(history.chaos.configs) == 1 + 2 + 3  # two failures in company, three alone


def test_an_image_that_always_kills_costs_three_restarts_and_nobody_else():
    arrivals = [Arrival([number], 10, at=100 * number, media=((0, number),)) for number in range(3)]
    history = History(arrivals, sick={bytes([1]) * 32}, max_restarts=8).play()

    assert history.endings == ["finished", "failed", "finished"]
    assert len(history.chaos.configs) == 1 + 3


def test_an_image_that_kills_in_company_costs_two_restarts_more_at_most():
    arrivals = [Arrival([number], 10, media=((0, number),)) for number in range(3)]
    history = History([*arrivals, Arrival([4], 4, at=1000)], sick={bytes([1]) * 32}, max_restarts=8).play()

    assert history.endings == ["finished", "failed", "finished", "finished"]
    assert 1 + 3 <= len(history.chaos.configs) <= 1 + 2 + 3


def test_many_requests_that_kill_do_not_end_the_server():
    arrivals = [Arrival([number], 4, poison=0) for number in range(12)]
    history = History([*arrivals, Arrival([1, 2], 4)], max_restarts=8, restart_window=1).play()

    assert history.endings == [*["failed"] * 12, "finished"]


def test_all_choices_of_a_request_that_kills_end():
    history = History([Arrival([1, 2], 6, choices=3, poison=4), Arrival([3], 6)]).play()

    assert history.endings == ["failed", "finished"]
    assert (
        len(history.chaos.configs) == 1 + 2 + 2 * 3 + 1
    )  # two failures in company, two of each choice alone, one choice's third


def test_workers_start_again_with_what_the_first_ones_found():
    history = History([Arrival([1], 4)], [(4, "die")]).play()
    first, again = (configs[0] for configs in history.chaos.configs)

    assert (first.num_blocks, first.media_cache_memory) == (None, None)
    assert (again.num_blocks, again.media_cache_memory) == (20, 12)


def test_ranks_that_hang_are_replaced():
    history = History([Arrival([1], 4)], [(4, "hang"), (0, "hang"), (4, "hang")]).play()

    assert history.endings == ["finished"]


@pytest.mark.parametrize("resets", [True, False])
def test_memory_that_runs_out_makes_steps_smaller(resets):
    arrivals = [Arrival(SHARED, 4) for number in range(4)]
    history = History(arrivals, [(2, "exhaust")], Geometry(memory=2, resets=resets)).play()

    assert history.endings == ["finished"] * 4
    assert len(history.chaos.configs) == (1 if resets else 3)


def test_a_request_that_there_is_no_memory_for_fails_alone():
    history = History([Arrival([0], 2), Arrival([1] * 8, 2, at=5)], geometry=Geometry(block_size=4, memory=-2)).play()

    assert history.endings == ["finished", "failed"]
    assert "memory ran out" in history.outcomes[1].why


def test_failures_that_never_end_do_end_the_server():
    history = History([Arrival([1], 4)] * 2, [(3, "die"), *[(0, "refuse")] * 20], max_restarts=3).play()

    assert str(history.error) == "workers cannot start again: refuses"
    assert history.endings == ["failed"] * 2
    assert len(history.chaos.configs) == 1 + 3
