"""Gated activations."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error, token_jobs
from dashinfer_kernels import silu_mul


def jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"silu_mul": _build})


def _build(place: Place, model: Model, tokens: int) -> Case:
    moved = 3 * tokens * model.intermediate * place.dtype.itemsize
    sets = [place.normal(tokens, 2 * model.intermediate) for _ in range(place.copies(moved))]

    def verify() -> float:
        gate, up = sets[0].to(torch.float64).chunk(2, -1)
        with poisoned():
            return relative_error(silu_mul(sets[0]), F.silu(gate) * up)

    def library(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return Case(
        calls=[partial(silu_mul, each) for each in sets],
        verify=verify,
        bytes_moved=moved,
        libraries={"F.silu, mul": [partial(library, each) for each in sets]},
    )
