"""What compiled loops are written with, see `loops`: threads, pointers, bfloat16 and an exponential that becomes vector code.

Numba keeps compiled code, and looks at a loop's own file alone for changes; `_sources` has it look at what loops call, too.
"""

import ctypes
import struct
from array import array as numbers
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from dashinfer_kernels import threads

# elements that take as long as threads take to come and go
_WORTH_THREADS = 1 << 16
_SPINS = 1 << 10  # then whoever a thread waits for may want its core
# sums in any order, fused products; not fastmath as a whole, which takes NaN for impossible
_FLAGS = {"contract", "reassoc", "nsz", "arcp"}


@cache
def _sources() -> str:
    """A hash of all that loops are compiled from."""
    here = Path(__file__).parent
    files = [here / "compiled.py", *sorted(here.glob("*/*loop.py")), *sorted(here.glob("*/tile_product.py"))]
    return sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


class _Kept(FunctionCache):
    def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
        return (*super()._index_key(*arguments), _sources())


class _Compiled(CFunc):
    _pyfunc: Any

    def enable_caching(self) -> None:
        self._cache = _Kept(self._pyfunc)


class Loop:
    """A compiled function that does tasks until none is left, on as many threads as torch has.

    The function takes the address of its arguments, int64: the number of the next task (`take` counts it up), the number of
    tasks, what is returned, and what the caller gives.
    """

    def __init__(self, function: Callable[[int], None]) -> None:
        options = {"fastmath": _FLAGS, "error_model": "numpy"}
        self._compiled: Any = _Compiled(function, normalize_signature("void(int64)"), {}, options)
        with suppress(RuntimeError):  # there is no folder to keep it in
            self._compiled.enable_caching()
        self._compiled.compile()
        self._address = self._compiled.address
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._address)

    def __call__(self, tasks: int, elements: int, *arguments: int) -> int:
        """Do `tasks` tasks of `elements` elements together. Returns what the loop wrote to that place, 0 if nothing.

        Raises:
            MemoryError: no thread had memory for what it needs before its first task. Those that have do all tasks.
        """
        work = numbers("q", (0, tasks, 0, *arguments))
        address, _ = work.buffer_info()
        if threads.parallel is None or elements < _WORTH_THREADS:
            self._alone(address)
        else:
            threads.parallel(self._address, address, 0, 0)
        if work[0] < tasks:
            raise MemoryError("no memory for the scratch of a compiled loop")
        return work[2]


@intrinsic
def take(context, address):
    """The number of the next task, which no other thread gets."""

    def generate(context, builder, signature, arguments):
        integer = arguments[0].type
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], integer.as_pointer()), integer(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def _current(context, address):
    """The number at an address, which other threads change."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], arguments[0].type.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def call(context, function):
    """What a C function, given by its address, without arguments, returns."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])

    return types.int32(types.int64), generate


@intrinsic
def _pause(context):
    def generate(context, builder, signature, arguments):
        builder.call(ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "pause", "", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit
def meet(count, target, give_way):
    """Wait until as many threads have come, one after the other, as make `target` with those of earlier meetings.

    `count` is the address of how many came; `give_way` that of `sched_yield`. On x86 alone.
    """
    take(count)
    spins = 0
    while _current(count) < target:
        _pause()
        spins += 1
        if spins > _SPINS:
            call(give_way)


def shared(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that loops call."""
    return numba.njit(fastmath=_FLAGS, error_model="numpy")(function)


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


@intrinsic(prefer_literal=True)
def given(context, address, count):
    """The first `count` arguments from an address on; `count` is a literal."""
    kind = types.UniTuple(types.int64, count.literal_value)

    def generate(context, builder, signature, arguments):
        integer = arguments[0].type
        first = builder.inttoptr(arguments[0], integer.as_pointer())
        places = (builder.gep(first, [integer(each)]) for each in range(kind.count))
        return context.make_tuple(builder, kind, [builder.load(place) for place in places])

    return kind(types.int64, count), generate


def float_bits(value: float) -> int:
    """A float32 among a loop's arguments; `as_float` there."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


@inlined
def as_float(bits):
    return np.uint32(bits).view(np.float32)


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
