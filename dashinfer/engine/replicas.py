"""Copies of the model that share the requests: several engines, each with workers, a scheduler and a prefix cache of its own,
seen from outside as one.

Knows which replica has a request; knows nothing of what it does with it.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import astuple
from functools import partial
from typing import Protocol

import msgspec
import trio

from dashinfer.engine.api import EngineAPI, EngineState, EngineStats, PromptMedia
from dashinfer.engine.blocks import extend_hashes
from dashinfer.engine.context import replica_number
from dashinfer.engine.generation import SequenceGroup
from dashinfer.engine.routing import Outlook, choose
from dashinfer.errors import EngineUnavailable, QueueFull
from dashinfer.guidance.guide import Grammar
from dashinfer.types import Progress, Ready, SamplingParams
from dashinfer.worker.supervisor import one_error


class Replica(EngineAPI, Protocol):
    """An engine as `Replicas` sees it."""

    num_queued: int  # requests of which nothing can run before others end

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None: ...

    def begin_drain(self) -> None: ...

    async def drained(self) -> None: ...

    def check(self, prompt: list[int]) -> None:
        """Raises what `submit` raises for the prompt itself."""
        ...

    def outlook(self, prompt: list[int], hashes: list[bytes]) -> Outlook:
        """`hashes`: of the prompt's full blocks, but for one that the last token completes."""
        ...

    def submit(
        self,
        prompt: list[int],
        params: list[SamplingParams],
        media: PromptMedia | None = None,
        grammar: Grammar | None = None,
    ) -> SequenceGroup: ...


class Replicas:
    """Implements `dashinfer.engine.api.EngineAPI` over replicas of one model. `run` is its life."""

    def __init__(self, replicas: Many[Replica], *, max_queue: int, prefix_cache: bool = True) -> None:
        """`max_queue`: requests that may wait in all replicas together."""
        self._replicas = replicas
        self._max_queue = max_queue
        self._prefix_cache = prefix_cache
        self._turn = 0
        self.info: Ready | None = None

    @property
    def state(self) -> EngineState:
        """Ready as soon as all were loaded and while one of them is; failed when one has failed for good."""
        states = {replica.state for replica in self._replicas}
        order: tuple[EngineState, ...] = ("failed", "draining", "loading", "ready", "recovering")
        return next(state for state in order if state in states)

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        """Load all replicas at the same time, then serve until cancelled; started with what each of them is, and the blocks
        of all. What a replica logs is known as its own.

        Raises:
            StartupError, WorkerError: as `dashinfer.engine.engine.Engine.run`, of the first that did.
        """
        loaded: dict[int, Ready] = {}

        async def load(number: int) -> None:
            replica_number.set(number)  # of this task, and of those that it starts
            loaded[number] = await nursery.start(self._replicas[number].run)

        with one_error():
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as loading:
                    for number in range(len(self._replicas)):
                        loading.start_soon(load, number)
                num_blocks = sum(each.num_blocks for each in loaded.values())
                self.info = msgspec.structs.replace(loaded[0], num_blocks=num_blocks)
                task_status.started(self.info)

    def begin_drain(self) -> None:
        for replica in self._replicas:
            replica.begin_drain()

    async def drained(self) -> None:
        """Return once no request is open."""
        for replica in self._replicas:
            await replica.drained()

    def submit(
        self,
        prompt: list[int],
        params: list[SamplingParams],
        media: PromptMedia | None = None,
        grammar: Grammar | None = None,
    ) -> SequenceGroup:
        """See `dashinfer.engine.api.EngineAPI.submit`, and `choose`. A replica that recovers gets requests only while no other
        one is ready. The queue is full when `max_queue` requests wait in all of them, and none would run this one at once."""
        if (state := self.state) not in ("ready", "recovering"):
            raise EngineUnavailable(f"the server is {state}")
        self._replicas[0].check(prompt)
        assert self.info is not None, "ready without a model"
        hashes: list[bytes] = []
        if self._prefix_cache:
            extend_hashes(hashes, prompt, self.info.block_size, media)
        numbers = [number for number, replica in enumerate(self._replicas) if replica.state == state]
        usable = hashes[: (len(prompt) - 1) // self.info.block_size]
        outlooks = [self._replicas[number].outlook(prompt, usable) for number in numbers]
        chosen = choose(outlooks, sum(number < self._turn for number in numbers) % len(numbers))
        queued = sum(replica.num_queued for replica in self._replicas)
        if queued >= self._max_queue and not (state == "ready" and outlooks[chosen].admits):
            raise QueueFull(f"{queued} of at most {self._max_queue} requests are waiting already; try again later")
        self._turn = numbers[chosen] + 1
        group = self._replicas[numbers[chosen]].submit(prompt, params, media, grammar)
        for sequence in group.sequences:
            sequence.hashes = list(hashes)  # need not be computed again
        return group

    def stats(self) -> EngineStats:
        """Of all together."""
        each = [astuple(replica.stats()) for replica in self._replicas]
        return EngineStats(*map(sum, zip(*each, strict=True)))


class SlowestProgress:
    """What replicas that load say, as one: of each stage the least that one has done."""

    def __init__(self, count: int, on_progress: Callable[[Progress], None]) -> None:
        self._on_progress = on_progress
        self._count = count
        self._done: dict[str, dict[int, Progress]] = {}  # by stage and replica

    def of(self, number: int) -> Callable[[Progress], None]:
        """What replica `number` reports to."""
        return partial(self._report, number)

    def _report(self, number: int, progress: Progress) -> None:
        known = self._done.setdefault(progress.stage, {})
        known[number] = progress
        slowest = min(known.values(), key=lambda each: each.done)
        if len(known) < self._count:
            slowest = msgspec.structs.replace(slowest, done=0)
        self._on_progress(slowest)
