"""RMS normalisation, with and without the residual stream."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error, token_jobs
from dashinfer_kernels import add_rms_norm, rms_norm

EPS = 1e-6


def jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"rms_norm": _plain, "add_rms_norm": _added})


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    x = x.to(torch.float64)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _plain(place: Place, model: Model, tokens: int) -> Case:
    moved = (2 * tokens + 1) * model.hidden * place.dtype.itemsize
    weight = place.normal(model.hidden)
    xs = [place.normal(tokens, model.hidden) for _ in range(place.copies(moved))]

    def verify() -> float:
        with poisoned():
            return relative_error(rms_norm(xs[0], weight, EPS), _reference(xs[0], weight))

    return Case(
        calls=[partial(rms_norm, x, weight, EPS) for x in xs],
        verify=verify,
        bytes_moved=moved,
        libraries={"F.rms_norm": [partial(F.rms_norm, x, (model.hidden,), weight, EPS) for x in xs]},
    )


def _added(place: Place, model: Model, tokens: int) -> Case:
    elements = tokens * model.hidden
    moved = elements * (2 * place.dtype.itemsize + 2 * 4) + model.hidden * 4
    weight = place.normal(model.hidden, dtype=torch.float32)
    sets = [
        (place.normal(tokens, model.hidden), place.normal(tokens, model.hidden, dtype=torch.float32))
        for _ in range(place.copies(moved))
    ]

    def verify() -> float:
        x, residual = sets[0][0], sets[0][1].clone()
        total = x.to(torch.float64) + residual
        with poisoned():
            out = add_rms_norm(x, residual, weight, EPS)
        return max(relative_error(out, _reference(total, weight)), relative_error(residual, total))

    def library(x: Tensor, residual: Tensor) -> Tensor:
        return F.rms_norm(residual.add_(x), (model.hidden,), weight, EPS).to(x.dtype)

    return Case(
        calls=[partial(add_rms_norm, x, residual, weight, EPS) for x, residual in sets],
        verify=verify,
        bytes_moved=moved,
        libraries={"add_, F.rms_norm, to": [partial(library, x, residual) for x, residual in sets]},
    )
