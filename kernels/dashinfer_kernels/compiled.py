"""What compiled loops are written with, see `loops`: pointers, bfloat16 and an exponential that LLVM turns into vector code.

Numba looks at a loop's own file for changes, not at this one: after a change here, remove the `*.nb?` files.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

# sums in any order, fused products; not fastmath as a whole, which takes NaN for impossible
_FLAGS = {"contract", "reassoc", "nsz", "arcp"}


def compiled(signature: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile for one signature, at once, or take what an earlier process has compiled and kept."""
    options = {"fastmath": _FLAGS, "error_model": "numpy", "nogil": True}

    def compile_loop(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # there is no folder to keep it in
            return numba.njit(signature, **options)(function)

    return compile_loop


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    return numba.njit(fastmath=_FLAGS, error_model="numpy", inline="always")(function)


@intrinsic
def _pointer(context, address, element):
    kind = types.CPointer(element.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(types.int64, element), generate


@inlined
def array(address, shape, element):
    """What lies at an address, contiguous."""
    return numba.carray(_pointer(address, element), shape)


@inlined
def widen(bits):
    """float32 of bfloat16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@inlined
def narrow(value):
    """bfloat16 bits of float32, rounded to the nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@inlined
def exp(x):
    """e to the power of a float32: relative error below 1e-5, infinite from 88.4 on, below -87 as there. Has vector form."""
    x = np.float32(-87) if x < np.float32(-87) else x
    x = np.float32(88.8) if x > np.float32(88.8) else x
    power = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    rest = x - power * np.float32(0.693359375) + power * np.float32(2.12194440e-4)
    series = np.float32(1.0 / 5040)
    for factor in (1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0):
        series = series * rest + np.float32(factor)
    return series * np.uint32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
