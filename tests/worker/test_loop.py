"""A rank's loop: what it does in which order, with a fake runner and an inbox that is filled while it works."""

import queue
import threading
import time
from dataclasses import dataclass

import pytest
import torch

import dashinfer_kernels
from dashinfer.errors import InsufficientMemory
from dashinfer.types import Encode, Encoded, Forget, OutOfMemory, Reset, StepPlan, StepResult
from dashinfer.worker import __main__ as loop
from dashinfer.worker.__main__ import SMALL_MODEL, Loop, arrange_threads
from dashinfer.worker.masks import MaskInbox


class End(Exception):
    pass


@dataclass
class Step:
    number: int


class Inbox(queue.SimpleQueue):
    """Raises End rather than wait for ever."""

    def get(self, block: bool = True, timeout: float | None = None):
        try:
            return super().get(block=False) if timeout is None else super().get(timeout=timeout)
        except queue.Empty:
            if block and timeout is None:
                raise End from None
            raise


class Rank:
    """A connection, a runner and its media in one, which write what happens into `record`.

    Args:
        blocks: of the tower, that encoding all that was asked for takes.
        steps: how many steps the parent asks for, one when the step before has a result.

    Attributes:
        starved: steps for which there is not enough memory; by the place where that shows.
    """

    def __init__(self, blocks: int, steps: int, *, on_gpu: bool = False) -> None:
        self.record: list = []
        self.inbox = Inbox()
        self.media = self
        self.masks = MaskInbox()
        self.on_gpu = on_gpu
        self.busy = 0  # how many looks at the device find it busy
        self.blocks, self._steps = blocks, steps
        self.starved: dict[int, str] = {}
        self._keys: list[bytes] = []
        self._new: list[bytes] = []
        self.failed: dict[bytes, InsufficientMemory] = {}

    # connection
    def send(self, message) -> None:
        if isinstance(message, StepResult):
            self.record.append(f"result {message.step}")
            if message.step + 1 < self._steps:
                self.inbox.put(StepPlan(message.step + 1, [], []))
        else:
            self.record.append(message)

    # runner
    def launch(self, plan: StepPlan):
        time.sleep(0.002)
        if plan.masked:
            self.masks.take(plan.step)
        if self.starved.get(plan.step) == "launch":
            raise InsufficientMemory("not enough")
        return Step(plan.step)

    def result(self, step) -> StepResult:
        if self.starved.get(step.number) == "result":
            raise InsufficientMemory("not enough")
        return StepResult(step.number, [])

    def reset(self) -> None:
        self.record.append("reset")

    # media
    @property
    def pending(self) -> bool:
        return bool(self._keys)

    @property
    def running(self) -> bool:
        self.busy -= 1
        return self.busy >= 0

    def ask(self, message: Encode) -> None:
        self._keys.append(message.key)

    def forget(self, keys) -> None:
        self._keys = [key for key in self._keys if key not in keys]
        self.record.append(f"forget {len(keys)}")

    def advance(self, seconds: float) -> None:
        self.record.append("slice" if seconds else "block")
        self.blocks -= 1
        if self.blocks == 0:
            self._new, self._keys = self._keys, []

    def take_new(self) -> list[bytes]:
        new, self._new = self._new, []
        return new

    def take_failed(self) -> dict[bytes, InsufficientMemory]:
        failed, self.failed = self.failed, {}
        return failed

    def run(self, rank: int = 0, world_size: int = 1) -> list:
        with pytest.raises(End):
            Loop(self, self, rank, world_size).run()
        return self.record


ASKED = Encode(b"a", (1, 2, 2), b"")


def test_decoding_goes_on_while_an_image_is_encoded():
    rank = Rank(blocks=4, steps=3)
    rank.inbox.put(ASKED)
    rank.inbox.put(StepPlan(0, [], []))

    assert rank.run() == [
        *("result 0", "slice", "result 1", "slice", "result 2", "slice"),
        "block",  # and without a plan it goes on by itself
        Encoded([b"a"]),
    ]


def test_a_plan_that_waits_already_comes_after_one_slice():
    rank = Rank(blocks=9, steps=0)
    rank.inbox.put(ASKED)
    for step in range(3):
        rank.inbox.put(StepPlan(step, [], []))

    assert rank.run()[:6] == ["result 0", "slice", "result 1", "slice", "result 2", "slice"]


def test_a_plan_is_not_kept_waiting_by_other_messages():
    rank = Rank(blocks=9, steps=0)
    for message in (ASKED, Encode(b"b", (1, 2, 2), b""), Forget([b"b"]), StepPlan(0, [], [])):
        rank.inbox.put(message)

    assert rank.run() == ["forget 1", "result 0", "slice", *["block"] * 8, Encoded([b"a"])]


def test_what_a_plan_had_encoded_is_told_after_its_result():
    rank = Rank(blocks=1, steps=0)
    launch = rank.launch

    def launch_and_encode(plan: StepPlan):
        rank.advance(1)
        return launch(plan)

    rank.launch = launch_and_encode
    rank.inbox.put(ASKED)
    rank.inbox.put(StepPlan(0, [], []))

    assert rank.run() == ["slice", "result 0", Encoded([b"a"])]


def test_a_long_encode_gives_signs_of_going_on(monkeypatch):
    monkeypatch.setattr(loop, "SIGN_INTERVAL", 0)
    rank = Rank(blocks=3, steps=0)
    rank.inbox.put(ASKED)

    assert rank.run() == ["block", Encoded([]), "block", Encoded([]), "block", Encoded([b"a"])]


def test_other_ranks_encode_and_say_nothing():
    rank = Rank(blocks=2, steps=0)
    rank.inbox.put(ASKED)
    rank.inbox.put(StepPlan(0, [], []))

    assert rank.run(rank=1) == ["slice", "block"]


def test_a_gpu_gets_the_next_slice_when_it_has_done_the_last():
    rank = Rank(blocks=2, steps=0, on_gpu=True)
    rank.inbox.put(ASKED)
    rank.busy = 3
    looks = []
    advance = rank.advance
    rank.advance = lambda seconds: (looks.append(rank.busy), advance(seconds))

    assert rank.run(rank=1) == ["slice", "slice"]
    assert max(looks) < 0


def test_a_model_that_does_not_see_waits_for_plans():
    rank = Rank(blocks=0, steps=2)
    rank.media = None
    rank.inbox.put(StepPlan(0, [], []))

    assert rank.run() == ["result 0", "result 1"]


@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_step_without_memory_is_dropped_with_those_after_it(where: str) -> None:
    rank = Rank(blocks=0, steps=0)
    rank.media = None
    rank.starved = {1: where}
    for message in (*(StepPlan(step, [], []) for step in range(4)), Reset(), StepPlan(4, [], [])):
        rank.inbox.put(message)

    assert rank.run() == ["result 0", OutOfMemory(1), "reset", "result 4"]


@pytest.mark.parametrize("where", ["launch", "result"])
def test_on_a_gpu_what_is_dropped_is_told_after_the_results_before_it(where: str) -> None:
    """The step after it is launched before anybody knows, and has no result either, nor masks."""
    rank = Rank(blocks=0, steps=0, on_gpu=True)
    rank.media = None
    rank.starved = {2: where}
    rank.inbox = queue.SimpleQueue()  # which waits
    answered = threading.Event()

    def send(message) -> None:
        Rank.send(rank, message)
        if isinstance(message, OutOfMemory):
            rank.masks.interrupt()
            rank.inbox.put(Reset())
            rank.inbox.put(StepPlan(4, [], []))
        if message == StepResult(4, []):
            answered.set()

    rank.send = send
    for step in range(4):
        rank.inbox.put(StepPlan(step, [], [], masked=step == 3))
    threading.Thread(target=Loop(rank, rank, 0).run, daemon=True).start()

    assert answered.wait(10)
    assert rank.record == ["result 0", "result 1", OutOfMemory(2), "reset", "result 4"]


def test_one_of_several_ranks_cannot_drop_a_step() -> None:
    rank = Rank(blocks=0, steps=0)
    rank.media = None
    rank.starved = {0: "launch"}
    rank.inbox.put(StepPlan(0, [], []))

    with pytest.raises(InsufficientMemory):
        rank.run(world_size=2)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_an_image_without_memory_is_told_and_nothing_else_is_lost(on_gpu: bool) -> None:
    rank = Rank(blocks=1, steps=0, on_gpu=on_gpu)
    rank.failed = {b"b": InsufficientMemory("not enough")}
    rank.inbox.put(ASKED)

    assert rank.run() == ["slice" if on_gpu else "block", Encoded([b"a"], [b"b"])]


def test_an_image_that_a_step_fails_for_is_told_before_the_step() -> None:
    rank = Rank(blocks=0, steps=0)
    rank.starved = {0: "launch"}
    rank.failed = {b"a": InsufficientMemory("not enough")}
    rank.inbox.put(StepPlan(0, [], []))

    assert rank.run() == [Encoded([], [b"a"]), OutOfMemory(0)]


def test_one_of_several_ranks_cannot_lack_an_image() -> None:
    rank = Rank(blocks=1, steps=0)
    rank.failed = {b"a": InsufficientMemory("not enough")}
    rank.inbox.put(ASKED)

    with pytest.raises(InsufficientMemory):
        rank.run(world_size=2)


@pytest.mark.parametrize(("weight_bytes", "expected"), [(SMALL_MODEL - 1, [1]), (SMALL_MODEL, ["a core each"])])
def test_a_small_model_computes_on_one_thread(weight_bytes: int, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    record: list = []
    monkeypatch.setattr(torch, "set_num_threads", record.append)
    monkeypatch.setattr(dashinfer_kernels, "pin_threads", lambda: record.append("a core each"))

    arrange_threads(weight_bytes)

    assert expected == record
