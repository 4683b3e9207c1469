"""Trying candidates: the op is made to look up one of them, checked, and timed on every case that shares a key of the table."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bench.gpu.timing import measure
from bench.ops.case import Case, Job, Place
from bench.tune.spaces import Config, Space
from dashinfer_kernels import tuning

Key = tuple[int | str, ...]
Report = Callable[[str], None]
CASES_A_KEY = 3
LEAST_GAIN = 1.02  # over the heuristic's config; less is noise


@dataclass(frozen=True)
class Found:
    """What was measured for one key."""

    op: str
    key: Key
    config: Config | None  # None: nothing is faster than the heuristic's by `LEAST_GAIN`
    gain: float  # the heuristic's time over the best one's, geometric mean over the cases
    tried: int
    refused: int  # candidates that do not compile, do not fit, or compute something else


@contextmanager
def looked_up(op: str, config: Config | None) -> Iterator[set[Key]]:
    """The op finds `config` whatever the key, or nothing; yields the keys that were asked for."""
    asked: set[Key] = set()
    lookup = tuning.lookup

    def overridden(name: str, key: Key) -> Config | None:
        if name != op:
            return lookup(name, key)
        asked.add(key)
        return config

    tuning.lookup = overridden
    _forget()
    try:
        yield asked
    finally:
        tuning.lookup = lookup
        _forget()


def _forget() -> None:
    """Drop what ops derived from the table once."""
    for name, module in list(sys.modules.items()):
        if name.startswith("dashinfer_kernels."):
            for value in list(vars(module).values()):
                if getattr(value, "__module__", None) == name and hasattr(value, "cache_clear"):
                    value.cache_clear()


def group_by_key(space: Space, jobs: Sequence[Job]) -> dict[Key, list[Job]]:
    """The space's jobs by the key that the op asks the table for; `CASES_A_KEY` of each at most, those with marks first."""
    groups: dict[Key, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: not job.marks):
        with looked_up(space.op, None) as asked:
            job.build().calls[0]()
        for key in asked:
            if len(group := groups.setdefault(key, [])) < CASES_A_KEY:
                group.append(job)
    return groups


def search(space: Space, place: Place, key: Key, jobs: Sequence[Job], *, deadline: float, report: Report) -> Found:
    """The fastest candidate for `key` among those that `deadline` of `time.monotonic` leaves time for."""
    cases = [job.build() for job in jobs]
    with looked_up(space.op, None):
        baseline = [_time(case, place) for case in cases]
    best, best_gain, tried, refused = None, 1.0, 0, 0
    for candidate in space.candidates:
        if time.monotonic() > deadline:
            report(f"{space.op} {key}: out of time after {tried} of {len(space.candidates)} candidates")
            break
        tried += 1
        with looked_up(space.op, candidate):
            try:
                gain = math.exp(
                    sum(math.log(old / _time(case, place)) for old, case in zip(baseline, cases, strict=True)) / len(cases)
                )
            except Exception as refusal:  # compilers and drivers refuse in many ways; the next candidate may do
                refused += 1
                report(f"{space.op} {key} {candidate}: {type(refusal).__name__}")
                continue
        if gain > best_gain:
            best, best_gain = candidate, gain
            report(f"{space.op} {key} {candidate}: {gain:.3f}x the heuristic")
    if best_gain < LEAST_GAIN:
        best = None
    return Found(space.op, key, best, best_gain, tried, refused)


def _time(case: Case, place: Place) -> float:
    """Microseconds. Raises ValueError if the result is wrong."""
    case.reset()
    error = case.verify()
    if not error <= case.tolerance:
        raise ValueError(f"relative error {error:.2g}")
    microseconds = measure(case.calls, place, 0.05).microseconds
    if place.device.type == "cuda":
        torch.cuda.synchronize()
    return microseconds
