"""When the GPU did nothing, read from the profiler's trace of kernels and copies."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

WAIT = 10.0  # microseconds: a shorter gap is that between two kernels of a step, a longer one is waiting for the host
SETTLING = 0.1
ACTIVITIES = ("kernel", "gpu_memcpy", "gpu_memset")

Interval = tuple[float, float]  # microseconds


@dataclass(frozen=True)
class Idle:
    """Shares of the time between the first activity and the last, without its first tenth."""

    any: float  # in gaps of whatever length
    waiting: float  # in gaps of at least `WAIT`


def measure_idle(intervals: Sequence[Interval]) -> Idle | None:
    """Of activities in any order, which may overlap; None where there are none."""
    if not intervals:
        return None
    ordered = sorted(intervals)
    first, last = ordered[0][0], max(end for _, end in ordered)
    # at first, the profiler's own start keeps the host from being ahead
    ordered = [each for each in ordered if each[0] >= first + SETTLING * (last - first)]
    if not ordered:
        return None
    begin, reached = ordered[0]
    gaps = []
    for start, end in ordered[1:]:
        if start > reached:
            gaps.append(start - reached)
        reached = max(reached, end)
    whole = reached - begin
    return Idle(sum(gaps) / whole, sum(gap for gap in gaps if gap >= WAIT) / whole)


def read_trace(path: Path) -> list[Interval]:
    """Begin and end of what ran on the device, from a trace that `torch.profiler` exported."""
    events = json.loads(path.read_text())["traceEvents"]
    return [(each["ts"], each["ts"] + each["dur"]) for each in events if each.get("cat") in ACTIVITIES and "dur" in each]
