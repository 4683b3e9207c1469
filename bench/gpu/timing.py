"""How long calls take on the device, launch gaps left out.

Calls are captured into a CUDA graph that takes turns over their memory, and its replays are timed with events.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.ops.case import Call, Place

LEAST_REPLAY = 2e-3  # seconds of work in a replay, so that its own launch does not count
MOST_CALLS = 256  # in a replay
LEAST_REPLAYS = 5


@dataclass(frozen=True)
class Timing:
    """Of one call."""

    microseconds: float  # the median over replays
    spread: float  # between the 10th and the 90th percentile, over the median
    method: str  # "graph", "events" where calls cannot be captured, or "clock"


def measure(calls: Sequence[Call], place: Place, seconds: float = 0.1) -> Timing:
    """Time a call by as many replays as `seconds` allow, at least `LEAST_REPLAYS`."""
    if place.device.type != "cuda":
        started = time.perf_counter()
        calls[0]()
        return Timing((time.perf_counter() - started) * 1e6, 0.0, "clock")
    for call in calls:  # compiles, and makes what later calls share
        call()
    torch.cuda.synchronize()
    replay, count, method = _prepare(calls)
    replay()
    samples: list[float] = []
    while len(samples) < LEAST_REPLAYS or sum(samples) < seconds:
        samples.append(_elapsed(replay))
    ordered = sorted(samples)
    median = statistics.median(ordered)
    spread = (ordered[round(0.9 * (len(ordered) - 1))] - ordered[round(0.1 * (len(ordered) - 1))]) / median
    return Timing(median / count * 1e6, spread, method)


def _prepare(calls: Sequence[Call]) -> tuple[Callable[[], Any], int, str]:
    """What is timed again and again, how many calls it makes, and how: as many as take `LEAST_REPLAY`, up to `MOST_CALLS`."""
    graph = _capture(calls)
    replay = _eager(calls) if graph is None else graph.replay
    replay()
    wanted = min(int(LEAST_REPLAY / _elapsed(replay) * len(calls)) + 1, MOST_CALLS)
    several = list(calls) * max(1, wanted // len(calls))
    if graph is None:
        return _eager(several), len(several), "events"
    if len(several) > len(calls) and (longer := _capture(several)) is not None:
        return longer.replay, len(several), "graph"
    return replay, len(calls), "graph"


def _eager(calls: Sequence[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _elapsed(run: Callable[[], Any]) -> float:
    """Seconds on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _capture(calls: Sequence[Call]) -> "torch.cuda.CUDAGraph | None":
    """None where the calls do what a graph cannot hold."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run."""

    copy: float  # bytes a second, read and written, of a large copy on the device
    matmul: float  # operations a second of a large bfloat16 product of random numbers


def measure_ceilings(place: Place) -> Ceilings:
    size, rows = (1 << 16, 64) if place.toy else (4 << 30, 8192)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=place.device)
    copy = measure([partial(torch.empty_like(source).copy_, source)], place, 0.5)
    pairs = [(place.normal(rows, rows), place.normal(rows, rows)) for _ in range(2)]
    product = measure([partial(torch.mm, *pair) for pair in pairs], place, 1.0)
    return Ceilings(2 * size / (copy.microseconds / 1e6), 2 * rows**3 / (product.microseconds / 1e6))
