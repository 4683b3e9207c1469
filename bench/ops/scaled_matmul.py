"""Linear layers with inputs and weights in 8 bits, given quantised rows as norms make them; beside the 16-bit product."""

from functools import partial

import torch
import torch.nn.functional as F

from bench.ops.case import Case, Job, Mark, Model, Place, poisoned, relative_error
from dashinfer_kernels import Linear, pack_quantized, quantize_float8, quantize_int, quantize_rows
from dashinfer_kernels.quant_matmul.reference import Activations

OPS: dict[str, Activations] = {"a8w8": "int8", "fp8": "fp8"}
ROWS = (4096, 1024, 256, 64, 16, 1)
CHECKED_ROWS = 64


def jobs(place: Place) -> list[Job]:
    return [
        Job(
            f"{op}_matmul",
            model,
            f"{rows} x {inputs} x {outputs}",
            partial(_build, place, activations, rows, inputs, outputs),
            _marks(activations, rows),
            rows,
        )
        for model in place.models
        for rows in ((3,) if place.toy else ROWS)
        for inputs, outputs in layer_shapes(model)
        for op, activations in OPS.items()
    ]


def many_row_jobs(place: Place) -> list[Job]:
    """Those of Qwen2.5's models whose rows do not say which kernel is fastest, or, in a toy place, any."""
    if place.toy:
        return jobs(place)
    return [job for job in jobs(place) if job.tokens > 64 and job.model.name.startswith("Qwen2.5")]


def layer_shapes(model: Model) -> list[tuple[int, int]]:
    """Inputs and outputs of a decoder layer's four matrices."""
    heads = model.heads * model.head_dim
    return [
        (model.hidden, 2 * model.intermediate),
        (model.intermediate, model.hidden),
        (model.hidden, heads + 2 * model.kv_heads * model.head_dim),
        (heads, model.hidden),
    ]


def _marks(activations: Activations, rows: int) -> tuple[Mark, ...]:
    least = 1.4 if rows >= 1024 else 1.7 if rows <= 16 and activations == "fp8" else 1.0
    return (Mark(f">= {least}x cuBLAS bf16", "cuBLAS", least),)


def _build(place: Place, activations: Activations, rows: int, inputs: int, outputs: int) -> Case:
    moved = inputs * outputs + rows * (inputs + 4) + outputs * 4 + rows * outputs * place.dtype.itemsize
    layers: list[Linear] = []
    weights, xs = [], []
    for _ in range(place.copies(moved)):
        weight = place.normal(outputs, inputs)
        values = quantize_float8(weight) if activations == "fp8" else quantize_int(weight, bits=8, symmetric=True)
        x = place.normal(rows, inputs)
        quantized = quantize_rows(x, activations)
        layers.append(pack_quantized(values, dtype=place.dtype, activations=activations))
        weights.append(weight)
        xs.append((x, quantized))

    def verify() -> float:
        # roundings of both operands are part of the error
        exact = F.linear(xs[0][0][:CHECKED_ROWS].to(torch.float64), weights[0].to(torch.float64))
        with poisoned():
            return relative_error(layers[0](xs[0][1])[:CHECKED_ROWS], exact)

    return Case(
        calls=[partial(layer, x) for layer, (_, x) in zip(layers, xs, strict=True)],
        verify=verify,
        bytes_moved=moved,
        tolerance=0.06 if activations == "fp8" else 0.03,
        flops=2 * rows * inputs * outputs,
        libraries={"cuBLAS": [partial(F.linear, x, weight) for (x, _), weight in zip(xs, weights, strict=True)]},
    )
