"""Torch's threads on CPU, for others to use and each on a core of its own.

Torch computes with OpenMP, and whoever calls `GOMP_parallel` from the same thread gets the same team of threads. They spin for
a while after each operation and so are there at once.
"""

import ctypes
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch


def _find_parallel() -> Callable[[object, int | None, int, int], None] | None:
    """`GOMP_parallel` of the library that torch brought, which has loaded it for everybody."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # before anything is pinned


def address(name: str) -> int:
    """Of a function of the C library or of OpenMP's."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


parallel = _find_parallel()  # calls a function, given by its address, with an argument on every thread; then 0, 0


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that Linux's control groups give this process, as containers are limited; None: as much as it wants.

    Args:
        groups: names the process's groups, of both versions.
        root: where they are mounted.
    """
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return None
    quotas = []
    for _, controllers, name in (line for line in lines if len(line) == 3):
        if not controllers:
            mounted = root
        elif "cpu" in controllers.split(","):
            mounted = root / "cpu"
        else:
            continue
        group = mounted / name.strip("/")
        while True:  # each group's limit holds for those below it
            quotas.append(_quota_of(group))
            if group == mounted or mounted not in group.parents:
                break
            group = group.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text() for file in files).split()
            return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def share_cores(index: int, count: int) -> None:
    """Compute on the caller's share of the cores, as one of `count` processes that do so; on one thread where cores are fewer.

    The calling thread, and those that it starts from now on, stay on them. Where a control group gives less time than there are
    cores, there are no more threads than that is for, unless OMP_NUM_THREADS says how many: threads that wait for one that has
    had its time wait long.
    """
    global _cores
    cores = len(_cores) or os.cpu_count() or 1
    each = cores // count
    quota = None if "OMP_NUM_THREADS" in os.environ else cpu_quota()
    if count > 1 and each and _cores:
        _cores = _cores[index * each : (index + 1) * each]
        os.sched_setaffinity(0, _cores)
    most = each if quota is None else min(each, int(quota / count))
    if most < cores:
        torch.set_num_threads(max(1, min(most, torch.get_num_threads())))


def pin_threads() -> bool:
    """Keep each of the caller's team of threads, itself included, on one core, where there are as many as cores to run on.

    Threads that wait for each other must not share a core while another one is free, as happens for a moment whenever another
    process has run. A thread that the caller starts later inherits its core, see `unpin`. Returns whether it was done.
    """
    if parallel is None or len(_cores) != torch.get_num_threads() or len(_cores) == 1:
        return False
    numbers = count()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def pin(_: int | None) -> None:
        os.sched_setaffinity(0, {_cores[next(numbers)]})  # 0 is the thread that calls

    parallel(ctypes.cast(pin, ctypes.c_void_p), None, 0, 0)
    return True


def unpin() -> None:
    """Let the calling thread, and those that it starts, run on all cores that the process computes on."""
    if _cores:
        os.sched_setaffinity(0, _cores)
