"""What a bench of an op is made of: shapes of models, a place to run, and cases that know what they must move and compute.

Knows nothing of time. A case is built just before it is measured, so that only its own inputs are in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
MOST_COPIES = 16


@dataclass(frozen=True)
class Model:
    """The shape of a decoder."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


MODELS = (
    Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128, 152064),
    Model("Qwen2.5-72B", 8192, 29568, 64, 8, 128, 152064),
    Model("Llama-3.1-8B", 4096, 14336, 32, 8, 128, 128256),
)
TOY = (Model("toy", 64, 96, 4, 2, 16, 300),)


@dataclass(frozen=True)
class Place:
    """Where cases run. A toy place has a few tiny cases, which are checked and not worth a figure."""

    device: torch.device
    dtype: torch.dtype
    cache_bytes: int  # of the device's last cache
    toy: bool = False

    @property
    def models(self) -> tuple[Model, ...]:
        return TOY if self.toy else MODELS

    def copies(self, bytes_moved: int) -> int:
        """Sets of inputs to take turns with: as many as push each other out of the cache, and `MOST_COPIES` at most."""
        return 1 if self.toy else max(1, min(MOST_COPIES, -(-4 * self.cache_bytes // max(bytes_moved, 1))))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers, normally distributed."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)


def find_place(*, toy: bool) -> Place:
    """The CUDA device and bfloat16; for `toy` the CPU and float16, whose products Triton's interpreter computes right."""
    if toy:
        return Place(torch.device("cpu"), torch.float16, 0, toy=True)
    properties = torch.cuda.get_device_properties(0)
    return Place(torch.device("cuda"), torch.bfloat16, getattr(properties, "L2_cache_size", 64 << 20))


@dataclass(frozen=True)
class Case:
    """One op with its inputs.

    Attributes:
        calls: the op, over different memory each.
        verify: runs the first call on fresh outputs and returns its relative error against a wider reference.
        tolerance: the greatest error that rounding explains.
        bytes_moved: the fewest that a call must read and write.
        flops: that a call must compute.
        libraries: the same computation by library calls, by name, over different memory each.
        reset: forgets what calls derived from launch parameters.
    """

    calls: list[Call]
    verify: Callable[[], float]
    bytes_moved: int
    flops: int = 0
    tolerance: float = 1e-2
    libraries: dict[str, list[Call]] = field(default_factory=dict)
    reset: Call = lambda: None


@dataclass(frozen=True)
class Mark:
    """What is asked of a figure: `least` of "fraction" (of the measured ceiling), or of the speed ratio to a library call."""

    what: str
    figure: str
    least: float


@dataclass(frozen=True)
class Job:
    """A case to be built when its turn has come."""

    op: str
    model: Model
    shape: str
    build: Callable[[], Case]
    marks: tuple[Mark, ...] = ()
    tokens: int = 0  # or rows, where the shape has one number of them


COPY_MARK = Mark(">= 85% of copy bandwidth", "fraction", 0.85)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of `expected`; infinite where anything is not finite."""
    wide = actual.to(torch.float64)
    if not wide.isfinite().all():
        return float("inf")
    expected = expected.to(torch.float64)
    return float((wide - expected).norm() / expected.norm())


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that `torch.empty` brings holds NaN, so that what an op does not write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def token_jobs(place: Place, builds: Mapping[str, Callable[[Place, Model, int], Case]]) -> list[Job]:
    """Of ops that move memory and treat a token alone: each with many tokens, which should reach the copy's rate, and with few.

    Args:
        builds: what builds the case of a number of tokens, by the name of its op.
    """
    found = []
    for model in place.models:
        for tokens in (3,) if place.toy else (4096, 64, 1):
            marks = (COPY_MARK,) if tokens == 4096 else ()
            for op, build in builds.items():
                found.append(Job(op, model, f"{tokens} tokens", partial(build, place, model, tokens), marks, tokens))
    return found
