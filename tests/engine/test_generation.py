"""A request's handle, fed by hand."""

import pytest
import trio
import trio.testing

from dashinfer.engine.generation import SequenceGroup
from dashinfer.engine.scheduler import Update
from dashinfer.engine.sequence import Sequence
from dashinfer.errors import InternalError
from dashinfer.types import FinishReason, SamplingParams


def make_group(choices: int, stopped: list[Sequence] | None = None) -> SequenceGroup:
    params = [SamplingParams(max_tokens=8, seed=0)] * choices
    on_stop = (stopped if stopped is not None else []).append
    return SequenceGroup([1, 2], params, on_enter=lambda group: None, on_exit=lambda group: None, on_stop=on_stop)


def deliver(group: SequenceGroup, index: int, token: int, finish: FinishReason | None = None) -> None:
    group.deliver(Update(group.sequences[index], token, None, finish))


async def received(group: SequenceGroup) -> list[tuple[int, int]]:
    return [(output.index, output.token) for output in await group.receive()]


async def test_what_is_ready_comes_at_once_and_the_end_is_empty() -> None:
    group = make_group(2)
    deliver(group, 0, 10)
    deliver(group, 1, 20, "stop")
    deliver(group, 0, 11, "length")

    assert await received(group) == [(0, 10), (1, 20), (0, 11)]
    assert await received(group) == []


async def test_a_reader_waits(autojump_clock: trio.testing.MockClock) -> None:
    group = make_group(1)
    batches = []

    async def read() -> None:
        while batch := await received(group):
            batches.append((trio.current_time() - began, batch))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(1)
        deliver(group, 0, 10)
        await trio.sleep(1)
        deliver(group, 0, 11)
        deliver(group, 0, 12, "length")

    assert batches == [(1, [(0, 10)]), (2, [(0, 11), (0, 12)])]


async def test_nothing_more_of_a_stopped_choice() -> None:
    stopped: list[Sequence] = []
    group = make_group(2, stopped)
    deliver(group, 0, 10)
    deliver(group, 1, 20)
    group.stop(0)
    first = await received(group)
    group.stop(1)

    assert first == [(1, 20)]
    assert await received(group) == []
    assert stopped == group.sequences


async def test_an_error_comes_after_what_was_not_read() -> None:
    group = make_group(1)
    deliver(group, 0, 10)
    group.fail(InternalError("first"))
    group.fail(InternalError("second"))

    assert await received(group) == [(0, 10)]
    with pytest.raises(InternalError, match="first"):
        await group.receive()


async def test_an_error_wakes_the_reader(autojump_clock: trio.testing.MockClock) -> None:
    group = make_group(1)

    async def fail() -> None:
        await trio.sleep(1)
        group.fail(InternalError("lost"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        with trio.fail_after(10), pytest.raises(InternalError, match="lost"):
            await group.receive()
