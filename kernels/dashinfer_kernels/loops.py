"""Compiled loops for few tokens on CPU, where a torch call costs more than its work: one loop takes the place of several calls.

Numba compiles them when an op's `cpu_loop.py` is imported, with a compiler (LLVM) that comes with it, and keeps the code in
files for the next process. Without a Numba that works, and in deterministic mode, ops take their torch paths. Loops take
bfloat16 only, as addresses, and run on one thread; NaN goes in and comes out as in torch.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from dashinfer_kernels import dispatch

MAX_TOKENS = 32  # beyond, torch's vectors and threads are worth their calls
_OPS = ("activation", "attention", "norm", "rope")

_spec = find_spec("numba")
enabled = _spec is not None and _spec.origin is not None  # tests clear it to have the torch paths


def fit(x: Tensor) -> bool:
    """Whether loops take these rows: a few of them, contiguous."""
    few = enabled and x.dtype == torch.bfloat16 and x.shape[0] <= MAX_TOKENS
    return few and x.is_contiguous() and not dispatch.deterministic and compile_all()


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
