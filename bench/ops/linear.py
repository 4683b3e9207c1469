"""Linear layers: the MLP's first, which is a model's largest; as they are, and with the sums of deterministic mode."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error
from dashinfer_kernels import pack_linear
from dashinfer_kernels.linear.launch import invariant_linear

CHECKED_ROWS = 64
Layer = Callable[[Tensor], Tensor]


def jobs(place: Place) -> list[Job]:
    return _jobs(place, "linear", pack_linear)


def invariant_jobs(place: Place) -> list[Job]:
    return _jobs(place, "invariant_linear", lambda weight: lambda x: invariant_linear(x, weight, None))


def _jobs(place: Place, op: str, make: Callable[[Tensor], Layer]) -> list[Job]:
    return [
        Job(
            op,
            model,
            f"{tokens} x {model.hidden} x {2 * model.intermediate}",
            partial(_build, place, model, tokens, make),
            (),
            tokens,
        )
        for model in place.models
        for tokens in ((3,) if place.toy else (4096, 64, 1))
    ]


def _build(place: Place, model: Model, tokens: int, make: Callable[[Tensor], Layer]) -> Case:
    dtype = torch.float32 if place.toy else place.dtype
    inputs, outputs = model.hidden, 2 * model.intermediate
    moved = (inputs * outputs + tokens * (inputs + outputs)) * dtype.itemsize
    copies = range(place.copies(moved))
    weights = [place.normal(outputs, inputs, dtype=dtype) for _ in copies]
    layers = [make(weight) for weight in weights]
    xs = [place.normal(tokens, inputs, dtype=dtype) for _ in copies]

    def verify() -> float:
        expected = F.linear(xs[0][:CHECKED_ROWS].to(torch.float64), weights[0].to(torch.float64))
        with poisoned():
            return relative_error(layers[0](xs[0])[:CHECKED_ROWS], expected)

    return Case(
        calls=[partial(layer, x) for layer, x in zip(layers, xs, strict=True)],
        verify=verify,
        bytes_moved=moved,
        flops=2 * tokens * inputs * outputs,
        libraries={"cuBLAS": [partial(F.linear, x, weight) for x, weight in zip(xs, weights, strict=True)]},
    )
