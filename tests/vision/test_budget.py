"""The budget of memory: order, the oldest one's right, refusals, and that nothing leaks."""

import random
from contextlib import ExitStack

import pytest
import trio
import trio.testing

from dashinfer.errors import QueueFull
from dashinfer.vision.budget import MediaBudget


async def test_what_fits_is_granted_at_once(autojump_clock: trio.testing.MockClock) -> None:
    budget = MediaBudget(100, max_waiting=0)
    with budget.open() as first, budget.open() as second:
        await first.take(60)
        await second.take(40)

        assert (budget.used, budget.num_waiting) == (100, 0)
        first.give(10)
        await second.take(10)
        second.settle(5)
        assert (budget.used, first.held, second.held) == (55, 50, 5)
    assert budget.used == 0


async def test_the_oldest_is_never_kept_waiting(autojump_clock: trio.testing.MockClock) -> None:
    budget = MediaBudget(100, max_waiting=5)
    record = []

    async def take(name: str, account, size: int) -> None:
        await account.take(size)
        record.append(name)

    with ExitStack() as stack:
        first, second, third = (stack.enter_context(budget.open()) for _ in range(3))
        async with trio.open_nursery() as nursery:
            await second.take(80)
            nursery.start_soon(take, "third", third, 30)
            await trio.testing.wait_all_tasks_blocked()
            await first.take(500)
            nursery.start_soon(take, "second", second, 30)
            await trio.testing.wait_all_tasks_blocked()

            assert (record, budget.used, budget.num_waiting) == ([], 580, 2)
            first.settle(10)  # the second is the oldest now
            await trio.testing.wait_all_tasks_blocked()
            assert (record, budget.used) == (["second"], 120)
            second.give(110)

    assert record == ["second", "third"]
    assert budget.used == 0


async def test_the_younger_do_not_pass_those_who_wait(autojump_clock: trio.testing.MockClock) -> None:
    budget = MediaBudget(100, max_waiting=5)
    record = []

    async def take(name: str, size: int) -> None:
        with budget.open() as account:
            await account.take(size)
            record.append(name)

    with budget.open() as first:
        await first.take(90)
        async with trio.open_nursery() as nursery:
            for name, size in (("large", 50), ("small", 5)):
                nursery.start_soon(take, name, size)
                await trio.testing.wait_all_tasks_blocked()
            assert record == []
            first.settle(20)

    assert record == ["large", "small"]


async def test_more_than_may_wait_are_refused(autojump_clock: trio.testing.MockClock) -> None:
    budget = MediaBudget(10, max_waiting=1)
    with budget.open() as first, budget.open() as second, budget.open() as third:
        await first.take(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.take, 5)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(QueueFull, match="1 requests wait for memory"):
                await third.take(5)
            nursery.cancel_scope.cancel()
        assert budget.num_waiting == 0
    assert budget.used == 0


@pytest.mark.parametrize("seed", range(20))
async def test_everybody_gets_done(autojump_clock: trio.testing.MockClock, seed: int) -> None:
    rng = random.Random(seed)
    budget = MediaBudget(100, max_waiting=1000)
    done = 0

    async def request() -> None:
        nonlocal done
        await trio.sleep(rng.random())
        with trio.move_on_after(rng.choice([0.5, 100])), budget.open() as account:

            async def medium() -> None:
                await account.take(rng.randrange(60))
                await trio.sleep(rng.random())
                await account.take(rng.randrange(60))

            async with trio.open_nursery() as nursery:
                for _ in range(rng.randrange(1, 4)):
                    nursery.start_soon(medium)
            account.settle(account.held // 4)
            await trio.sleep(rng.random())
        done += 1

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(request)

    assert done == 50
    assert (budget.used, budget.num_waiting) == (0, 0)
