"""When requests are sent: as others end, or when they are due. Knows nothing of what they ask or of HTTP."""

import itertools
import math
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Literal, TypeVar

import trio

Item = TypeVar("Item")


async def closed_loop(
    send: Callable[[Item], Awaitable[None]], items: Iterable[Item], workers: int, seconds: float = math.inf
) -> None:
    """Sends items, `workers` at a time, each worker its next one as soon as its last one has been answered.

    Args:
        send: returns once the item has been answered.
        seconds: after which none is sent any more; what runs then still ends.
    """
    waiting = iter(items)
    end = trio.current_time() + seconds

    async def work() -> None:
        for item in waiting:  # one iterator for all workers: each takes the next item
            await send(item)
            if trio.current_time() >= end:
                return

    async with trio.open_nursery() as nursery:
        for _ in range(workers):
            nursery.start_soon(work)


async def open_loop(
    send: Callable[[Item, float], Awaitable[None]], items: Iterable[Item], offsets: Iterable[float], most: float = math.inf
) -> None:
    """Sends each item when it is due, whether others have been answered or not.

    Args:
        send: gets the item and the time at which it was due; returns once it has been answered.
        offsets: seconds from now at which items are due, never falling; their end is the end of the items.
        most: items under way at once; more wait, in order.
    """
    began = trio.current_time()
    places = trio.CapacityLimiter(most)

    async def send_one(item: Item, due: float) -> None:
        async with places:
            await send(item, due)

    async with trio.open_nursery() as nursery:
        for offset, item in zip(offsets, items, strict=False):
            await trio.sleep_until(began + offset)
            nursery.start_soon(send_one, item, began + offset)


def arrivals(rate: float, kind: Literal["poisson", "constant"], seed: str) -> Iterator[float]:
    """Seconds from the first request to each, without end.

    Args:
        rate: requests/s; `inf` is all at once.
        kind: whether gaps are exponentially distributed (a Poisson process) or all the same.
    """
    if math.isinf(rate):
        return itertools.repeat(0.0)
    if kind == "constant":
        return (index / rate for index in itertools.count())
    draws = random.Random(seed)
    return itertools.accumulate((draws.expovariate(rate) for _ in itertools.count()), initial=0.0)
