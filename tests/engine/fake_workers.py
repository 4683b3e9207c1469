"""Worker groups without processes, for `Engine(make_workers=...)`: fake ranks that fail where and how a script says.

Time is the test's: a step takes a second.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from dashinfer.errors import InsufficientMemory, StartupError, WorkerError
from dashinfer.types import Encode, Encoded, Forget, FromParent, OutOfMemory, Ready, Reset, StepPlan

from .fake_rank import FakeRank

LOAD, STEP, ENCODE = 2.0, 1.0, 0.5  # seconds
SILENCE = 30.0  # seconds until a hanging rank is missed by its heartbeat
# how a rank fails: dies, says that it cannot start, hangs, dies of a lack of memory, runs out of memory in the next step
Manner = Literal["die", "refuse", "hang", "memory", "exhaust"]


@dataclass
class Chaos:
    """How ranks fail, one group after the other, and what they were doing then: that is who the engine may give up.

    Args:
        rank: arguments of `FakeRank`.
        faults: (boundaries, manner): the first fails a group after so many of its message boundaries, and so on.
        poison: by a sequence's seed, the position whose computing kills.
        sick: keys of media whose encoding kills.
        huge: keys of media that there is no memory to encode.
        shows: by seed, keys of media.
        memory: tokens of a step that there is memory for.
        resets: whether ranks go on after running out of memory.

    Attributes:
        causes: reasons that there were to start again.
        configs: of each group.
        group: the last one.
        kills: by seed, failures by its poison.
        strikes: by seed, failures since its last token.
        guilty: seeds that were all that was computed at their third strike or a later one, or when memory ran out in the
            smallest step, or that show what is huge.
    """

    rank: Mapping[str, Any]
    ready: Ready
    faults: deque[tuple[int, Manner]] = field(default_factory=deque)
    poison: Mapping[int, int] = field(default_factory=dict)
    sick: Collection[bytes] = ()
    huge: Collection[bytes] = ()
    shows: Mapping[int, Collection[bytes]] = field(default_factory=dict)
    memory: int = 1 << 30
    resets: bool = True
    causes: int = 0
    kills: Counter[int] = field(default_factory=Counter)
    strikes: Counter[int] = field(default_factory=Counter)
    guilty: set[int] = field(default_factory=set)
    configs: list = field(default_factory=list)
    group: "FakeWorkers | None" = None
    late: deque[Callable[[], None]] = field(default_factory=deque)  # what groups that failed have yet to say

    def make_workers(self, configs: object) -> "FakeWorkers":
        self.configs.append(configs)
        if self.group is not None:
            self.group.blame()
        self.group = FakeWorkers(self)
        return self.group


class FakeWorkers:
    """Implements `dashinfer.engine.api.Workers`."""

    def __init__(self, chaos: Chaos) -> None:
        self._chaos = chaos
        self._rank = FakeRank(**chaos.rank)
        self._inbox: deque[FromParent] = deque()
        self._come = trio.Event()
        self._passed = 0  # message boundaries
        self._exhausted = False
        self._given_up: set[bytes] = set()  # keys, until they are forgotten
        self._told: set[bytes] = set()  # keys that the parent has been told are encoded
        self._seeds: dict[int, int] = {}  # by slot
        self._computing: deque[list[int]] = deque()  # seeds of each plan without a result

    async def send(self, message: FromParent) -> None:
        if isinstance(message, StepPlan):
            self._seeds |= {enter.slot: enter.sampling.seed for enter in message.enter}
            self._computing.append([self._seeds[chunk.slot] for chunk in message.chunks])
        self._inbox.append(message)
        self._come.set()

    async def run(self, *, on_progress, on_result, on_encoded, on_memory, task_status) -> None:
        self._on_result, self._on_encoded, self._on_memory = on_result, on_encoded, on_memory
        try:
            await self._boundary()
            await trio.sleep(LOAD)
            await self._boundary()
            task_status.started(self._chaos.ready)
            while True:
                await self._serve()
        except (WorkerError, StartupError):
            self._chaos.causes += 1
            raise

    async def _serve(self) -> None:
        if not self._inbox:
            if waiting := [key for key in self._rank.media if key not in self._rank.encoded | self._given_up]:
                await self._encode(waiting[0])
                return
            self._come = trio.Event()
            await self._come.wait()
        await self._boundary()
        message = self._inbox.popleft()
        match message:
            case StepPlan():
                await self._step(message)
            case Encode() | Forget():
                self._given_up -= {message.key} if isinstance(message, Encode) else set(message.keys)
                self._rank.tell(message)
            case _:
                raise AssertionError("memory had not run out")
        await self._boundary()

    async def _encode(self, key: bytes) -> None:
        await trio.sleep(ENCODE)
        if key in self._chaos.sick:
            raise WorkerError("a sick image")
        if key in self._chaos.huge:
            self._given_up.add(key)
            self._chaos.guilty.update(seed for seed, keys in self._chaos.shows.items() if key in keys)
            self._on_encoded(Encoded([], [key]))
            return
        await self._boundary(lambda: self._on_encoded(Encoded([key])))
        keys = self._rank.encode(1)
        self._told.update(keys)
        self._on_encoded(Encoded(keys))

    async def _step(self, plan: StepPlan) -> None:
        chaos = self._chaos
        await trio.sleep(STEP)
        tokens = sum(chunk.length for chunk in plan.chunks)
        if tokens > chaos.memory or self._exhausted:
            if len(plan.chunks) == 1 and tokens <= self._rank.block_size:
                chaos.guilty.update(self._computing[0])
            await self._run_out(plan)
            return
        # What was forgotten, and asked for again before the parent knew that it had been there, is waited for.
        result = self._rank.execute(plan, finish=self._told)
        if self._rank.encoded:
            self._on_encoded(Encoded(list(self._rank.encoded)))
        for seed, chunk in zip(self._computing[0], plan.chunks, strict=True):
            if chunk.start <= chaos.poison.get(seed, -1) < chunk.start + chunk.length:
                chaos.kills[seed] += 1
                raise WorkerError("a poisoned request")
        await self._boundary(lambda: self._on_result(result))
        if chaos.late:
            chaos.late.popleft()()
        for seed, chunk in zip(self._computing.popleft(), plan.chunks, strict=True):
            if chunk.sample:
                chaos.strikes[seed] = 0
        self._on_result(result)

    async def _run_out(self, plan: StepPlan) -> None:
        self._exhausted = False
        if not self._chaos.resets:
            raise InsufficientMemory("memory ran out in a step")
        self._computing.clear()
        self._on_memory(OutOfMemory(plan.step))
        while True:
            while self._inbox:
                message = self._inbox.popleft()
                if isinstance(message, Reset):
                    self._rank.reset()
                    return
                if not isinstance(message, StepPlan):
                    self._rank.tell(message)
            self._computing.clear()
            self._come = trio.Event()
            await self._come.wait()

    async def _boundary(self, about_to: Callable[[], None] | None = None) -> None:
        """Fail, if it is time; what was about to be said is said later then."""
        faults = self._chaos.faults
        self._passed += 1
        if not faults or self._passed <= faults[0][0]:
            return
        _, manner = faults.popleft()
        self._passed = 0
        if manner == "exhaust":
            self._exhausted = True
            return
        if about_to is not None:
            self._chaos.late.append(about_to)
        match manner:
            case "die":
                raise WorkerError("died")
            case "refuse":
                raise StartupError("refuses")
            case "memory":
                raise InsufficientMemory("memory ran out")
        try:
            await trio.sleep(SILENCE)
        except trio.Cancelled:
            self._chaos.causes += 1
            raise
        raise WorkerError("silent")

    def blame(self) -> None:
        """For the group's failure; called once the parent knows of it, for it may have sent plans until then."""
        chaos = self._chaos
        waiting = {message.key for message in self._inbox if isinstance(message, Encode)}
        waiting |= self._rank.media.keys() - self._rank.encoded
        computing = {seed for seeds in self._computing for seed in seeds}
        showing = {seed for seed, keys in chaos.shows.items() if waiting & set(keys)}
        for seed in computing | showing:
            chaos.strikes[seed] += 1
            if chaos.strikes[seed] >= 3 and computing <= {seed}:
                chaos.guilty.add(seed)
