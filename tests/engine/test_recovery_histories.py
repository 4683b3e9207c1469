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
        config = {"max_restarts": NEVER, "restart_window": 60.0, **config}
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
        assert max(self.chaos.kills.values(), default=0) <= 3
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
        max_tokens=st.one_of(st.integers(1, 12), st.integers(8, 12)),
        at=st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 40)),
        choices=rarely(st.integers(2, 3), 1),
        stop=st.lists(st.integers(0, 49), max_size=2).map(tuple),
        media=rarely(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=2).map(tuple), ()),
        patience=rarely(st.integers(1, 60).map(float), END),
        enough=rarely(st.integers(0, 6), NEVER),
        stop_first=rarely(st.integers(1, 4), NEVER),
        poison=rarely(st.integers(0, 16), None),
    ),
    min_size=1,
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
    max_batch=st.integers(1, 4),
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
