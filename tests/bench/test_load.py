"""When requests are sent, on a clock that jumps."""

import itertools
import math
import statistics

import pytest
import trio

from dashinfer.bench.load import arrivals, closed_loop, open_loop


async def test_workers_send_their_next_item_when_the_last_has_been_answered(autojump_clock: trio.testing.MockClock) -> None:
    record: list[tuple[float, str]] = []
    began = trio.current_time()

    async def send(item: int) -> None:
        record.append((trio.current_time() - began, "sent"))
        await trio.sleep(item)

    await closed_loop(send, [1, 3, 1, 1], 2)

    assert record == [(0, "sent"), (0, "sent"), (1, "sent"), (2, "sent")]
    assert trio.current_time() - began == 3


async def test_no_item_is_sent_after_the_time_and_those_under_way_end(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    answered: list[int] = []

    async def send(item: int) -> None:
        await trio.sleep(2)
        answered.append(item)

    await closed_loop(send, range(99), 2, seconds=3)

    assert sorted(answered) == [0, 1, 2, 3]
    assert trio.current_time() - began == 4


async def test_items_are_sent_when_they_are_due(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    record: list[tuple[str, float, float]] = []

    async def send(item: str, due: float) -> None:
        record.append((item, due - began, trio.current_time() - began))
        await trio.sleep(100)

    await open_loop(send, "abcd", [0, 1, 1, 5, 9])

    assert record[:1] + sorted(record[1:]) == [("a", 0, 0), ("b", 1, 1), ("c", 1, 1), ("d", 5, 5)]
    assert trio.current_time() - began == 105


async def test_items_beyond_the_bound_wait_in_order(autojump_clock: trio.testing.MockClock) -> None:
    began = trio.current_time()
    record: list[tuple[int, float, float]] = []

    async def send(item: int, due: float) -> None:
        record.append((item, due - began, trio.current_time() - began))
        await trio.sleep(2)

    await open_loop(send, range(4), [0, 1, 1.5, 4.5], most=1)

    assert record == [(0, 0, 0), (1, 1, 2), (2, 1.5, 4), (3, 4.5, 6)]


def test_constant_arrivals() -> None:
    assert list(itertools.islice(arrivals(4, "constant", "0"), 4)) == [0, 0.25, 0.5, 0.75]
    assert list(itertools.islice(arrivals(math.inf, "poisson", "0"), 3)) == [0, 0, 0]


@pytest.mark.parametrize("rate", [0.5, 20])
def test_poisson_arrivals_have_exponential_gaps_of_the_rates_mean(rate: float) -> None:
    gaps = [later - earlier for earlier, later in itertools.pairwise(itertools.islice(arrivals(rate, "poisson", "0"), 5001))]

    assert statistics.fmean(gaps) == pytest.approx(1 / rate, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / rate, rel=0.05)  # constant ones have 0
    assert sum(gap > 1 / rate for gap in gaps) / 5000 == pytest.approx(math.exp(-1), abs=0.03)


def test_the_same_seed_draws_the_same_arrivals() -> None:
    first, again, other = (list(itertools.islice(arrivals(2, "poisson", seed), 9)) for seed in ("a", "a", "b"))

    assert first == again
    assert first != other
    assert first[0] == 0
