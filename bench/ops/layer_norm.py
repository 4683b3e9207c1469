"""Layer normalisation with the residual stream."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error, token_jobs
from dashinfer_kernels import add_layer_norm
from dashinfer_kernels.layer_norm import reference

EPS = 1e-6


def jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"add_layer_norm": _build})


def _build(place: Place, model: Model, tokens: int) -> Case:
    elements = tokens * model.hidden
    moved = elements * (2 * place.dtype.itemsize + 2 * 4) + 2 * model.hidden * 4
    weight, bias = place.normal(2, model.hidden, dtype=torch.float32)
    sets = [
        (place.normal(tokens, model.hidden), place.normal(tokens, model.hidden, dtype=torch.float32))
        for _ in range(place.copies(moved))
    ]

    def verify() -> float:
        x, residual = sets[0][0], sets[0][1].clone()
        total = x.to(torch.float64) + residual
        with poisoned():
            out = add_layer_norm(x, residual, weight, bias, EPS)
        expected = reference.layer_norm(total, weight.to(torch.float64), bias.to(torch.float64), EPS)
        return max(relative_error(out, expected), relative_error(residual, total))

    def library(x: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(residual.add_(x), (model.hidden,), weight, bias, EPS).to(x.dtype)

    return Case(
        calls=[partial(add_layer_norm, x, residual, weight, bias, EPS) for x, residual in sets],
        verify=verify,
        bytes_moved=moved,
        libraries={"add_, F.layer_norm, to": [partial(library, x, residual) for x, residual in sets]},
    )
