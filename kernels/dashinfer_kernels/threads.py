"""Torch's threads on CPU, for others to use and each on a core of its own.

Torch computes with OpenMP, and whoever calls `GOMP_parallel` from the same thread gets the same team of threads. They spin for
a while after each operation and so are there at once.
"""

import ctypes
import os
from collections.abc import Callable
from itertools import count

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


def share_cores(index: int, count: int) -> None:
    """Compute on the caller's share of the cores, as one of `count` processes that do so; on one thread where cores are fewer.

    The calling thread, and those that it starts from now on, stay on them.
    """
    global _cores
    if count == 1:
        return
    each = (len(_cores) or os.cpu_count() or 1) // count
    if each and _cores:
        _cores = _cores[index * each : (index + 1) * each]
        os.sched_setaffinity(0, _cores)
    torch.set_num_threads(max(1, min(each, torch.get_num_threads())))


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
