"""Activations to 8 bits: alone, and in the norm or the gated activation that makes them."""

from functools import partial

import torch
from torch import Tensor

from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error, token_jobs
from dashinfer_kernels import QuantizedRows, add_rms_norm, quantize_rows, silu_mul

EPS = 1e-6
ROUNDING = 1e-2  # of int8, for numbers that are normally distributed


def jobs(place: Place) -> list[Job]:
    return [*plain_jobs(place), *norm_jobs(place), *gated_jobs(place)]


def plain_jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"quantize_rows": _rows})


def norm_jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"add_rms_norm_int8": _norm})


def gated_jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"silu_mul_int8": _gated})


def _wide(x: Tensor | QuantizedRows) -> Tensor:
    assert isinstance(x, QuantizedRows)
    return x.values.to(torch.float64) * x.scales.to(torch.float64)[:, None]


def _rows(place: Place, model: Model, tokens: int) -> Case:
    moved = tokens * (model.hidden * (place.dtype.itemsize + 1) + 4)
    xs = [place.normal(tokens, model.hidden) for _ in range(place.copies(moved))]

    def verify() -> float:
        with poisoned():
            return relative_error(_wide(quantize_rows(xs[0], "int8")), xs[0])

    return Case([partial(quantize_rows, x, "int8") for x in xs], verify, moved, tolerance=2 * ROUNDING)


def _norm(place: Place, model: Model, tokens: int) -> Case:
    moved = tokens * (model.hidden * (place.dtype.itemsize + 2 * 4 + 1) + 4) + model.hidden * 4
    weight = place.normal(model.hidden, dtype=torch.float32)
    sets = [
        (place.normal(tokens, model.hidden), place.normal(tokens, model.hidden, dtype=torch.float32))
        for _ in range(place.copies(moved))
    ]

    def verify() -> float:
        x, residual = sets[0][0], sets[0][1].clone()
        exact = add_rms_norm(x, residual.clone(), weight, EPS)
        with poisoned():
            return relative_error(_wide(add_rms_norm(x, residual, weight, EPS, quantize="int8")), exact)

    calls = [partial(add_rms_norm, x, residual, weight, EPS, quantize="int8") for x, residual in sets]
    return Case(calls, verify, moved, tolerance=2 * ROUNDING)


def _gated(place: Place, model: Model, tokens: int) -> Case:
    moved = tokens * (model.intermediate * (2 * place.dtype.itemsize + 1) + 4)
    sets = [place.normal(tokens, 2 * model.intermediate) for _ in range(place.copies(moved))]

    def verify() -> float:
        exact = silu_mul(sets[0])
        with poisoned():
            return relative_error(_wide(silu_mul(sets[0], quantize="int8")), exact)

    return Case([partial(silu_mul, each, quantize="int8") for each in sets], verify, moved, tolerance=4 * ROUNDING)
