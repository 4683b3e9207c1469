"""Compiled loops on CPU: one takes the place of several torch calls, each of which reads and writes everything, and costs more
than its work where tokens are few.

Numba compiles them when an op's `cpu_loop.py` is imported, with a compiler (LLVM) that comes with it, and keeps the code in
files for the next process. Without a Numba that works, and in deterministic mode, ops take their torch paths. Loops take
bfloat16 only, as addresses; NaN goes in and comes out as in torch.

They run on torch's own threads, see `threads`. Where torch has another kind of threads a loop runs on one, and takes few rows.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from dashinfer_kernels import dispatch, threads

MAX_ROWS_ALONE = 32  # beyond, where loops have one thread, torch's vectors and threads are worth their calls
_OPS = ("activation", "attention", "norm", "quant_matmul", "rope")

_spec = find_spec("numba")
enabled = _spec is not None and _spec.origin is not None  # tests clear it to have the torch paths


def fit(x: Tensor) -> bool:
    """Whether loops take these rows, contiguous ones."""
    return x.is_contiguous() and take(x.dtype, len(x))


def take(dtype: torch.dtype, rows: int) -> bool:
    """Whether loops take so many rows of a type."""
    fits = enabled and dtype == torch.bfloat16 and (threads.parallel is not None or rows <= MAX_ROWS_ALONE)
    return fits and not dispatch.deterministic and compile_all()


@cache
def compile_all() -> bool:
    """Whether all loops are there, compiled. One that fails costs a warning, and all of them."""
    try:
        for op in _OPS:
            import_module(f"dashinfer_kernels.{op}.cpu_loop")
    # whatever a Numba raises that does not go with this Python, NumPy or LLVM, or cannot read or write its files
    except Exception as error:
        warnings.warn(f"Numba cannot compile loops, so steps on CPU take longer: {error!r}", RuntimeWarning, stacklevel=2)
        return False
    return True


def warm_up_loops(dtype: torch.dtype) -> None:
    """Have all loops compiled that ops may take for inputs of `dtype`: seconds in a first process, half of one later on."""
    if enabled and dtype == torch.bfloat16 and not dispatch.deterministic:
        compile_all()
