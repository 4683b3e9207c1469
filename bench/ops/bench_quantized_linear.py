"""Time of a model's linear layers on CPU, in each form that their weights can have, by number of rows.

    python -m bench.ops.bench_quantized_linear
    python -m bench.ops.bench_quantized_linear --forms bfloat16 a16w4 --rows 1 16 --threads 1

Layers are those of SmolLM2-135M, each with weights of its own, so that no cache holds them from one step to the next. Other
load on the machine only ever adds time, so a figure is the sum, over every call of a step, of the fastest that call ever was,
in milliseconds. Where a layer has two paths, each is forced for any number of rows beside what the layer chooses by itself.
Before it is timed, a form is compared with its definition.
"""

import argparse
import gc
import time
from dataclasses import dataclass

import torch

from bench.ops.case import relative_error
from dashinfer_kernels import Linear, QuantizedWeight, pack_linear, pack_quantized
from dashinfer_kernels.quant_matmul.reference import Activations, quantized_linear
from dashinfer_kernels.quant_matmul.weight import FLOAT8

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
HEAD = (49152, 576)
LAYERS = 30
TOLERANCE = 2e-2
LEAST_STEPS = 3


@dataclass(frozen=True)
class Form:
    """What weights are kept as; `bits` None: float8. `most_rows`: what is forced instead of the layer's own choice."""

    bits: int | None
    group_size: int | None = None
    symmetric: bool = True
    activations: Activations | None = None
    wide_copy: bool = False
    most_rows: int | None = None


ANY, NONE = 2**40, 0
FORMS: dict[str, Form | None] = {
    "bfloat16": None,
    "a16w8": Form(8),
    "a16w8 kernel": Form(8, most_rows=ANY),
    "a16w8 blocks": Form(8, most_rows=NONE),
    "a16w8 groups of 32": Form(8, 32),
    "a16w8 groups of 32, kernel": Form(8, 32, most_rows=ANY),
    "a16w8 groups of 32, blocks": Form(8, 32, most_rows=NONE),
    "a16w8 groups of 16": Form(8, 16),
    "a16w4 groups of 32": Form(4, 32, symmetric=False),
    "a16w4": Form(4, 128, symmetric=False),
    "a16w4 kernel": Form(4, 128, symmetric=False, most_rows=ANY),
    "a16w4 blocks": Form(4, 128, symmetric=False, most_rows=NONE),
    "a16w4 and copy": Form(4, 128, symmetric=False, wide_copy=True),
    "a8w8": Form(8, activations="int8"),
    "fp8": Form(None, activations="fp8"),
}


def random_weight(form: Form, outputs: int, inputs: int) -> QuantizedWeight:
    """With values of a variance of about 1 / inputs."""
    size = form.group_size or inputs
    while inputs % size:
        size //= 2
    shape = (outputs, inputs // size)
    if form.bits is None:
        codes = torch.randn(outputs, inputs).clamp_(-4, 4).mul_(100).to(FLOAT8)
        return QuantizedWeight(codes=codes, scales=(0.5 + torch.rand(shape)) * inputs**-0.5 / 100, group_size=size)
    most = 2**form.bits
    codes = torch.randint(0, most, (outputs, inputs), dtype=torch.uint8)
    scales = (0.5 + torch.rand(shape)) * inputs**-0.5 * 3 / most
    if form.symmetric:
        codes = (codes - most // 2).view(torch.int8)
    offsets = None if form.symmetric else scales * (torch.rand(shape) - most / 2)
    return QuantizedWeight(codes=codes, scales=scales, offsets=offsets, bits=form.bits, group_size=size)


def random_layer(form: Form | None, outputs: int, inputs: int) -> Linear:
    """None: a 16-bit one."""
    if form is None:
        return pack_linear(torch.randn(outputs, inputs).mul_(inputs**-0.5).bfloat16())
    return pack(form, random_weight(form, outputs, inputs))


def pack(form: Form, weight: QuantizedWeight) -> Linear:
    layer = pack_quantized(weight, dtype=torch.bfloat16, activations=form.activations, wide_copy=form.wide_copy)
    if form.most_rows is not None:
        layer.most_rows = form.most_rows
    return layer


def check(form: Form) -> None:
    """Raises ValueError: a layer is wrong."""
    for outputs, inputs in SHAPES:
        weight = random_weight(form, outputs, inputs)
        x = torch.randn(5, inputs).bfloat16()
        expected = quantized_linear(x, weight, None, "int8" if form.activations == "int8" else None)
        error = relative_error(pack(form, weight)(x), expected)
        if not error < TOLERANCE:
            raise ValueError(f"{form} is wrong by {error:.2g} at {outputs} x {inputs}")


def measure(layers: list[Linear], rows: int, seconds: float) -> float:
    """Milliseconds of a step."""
    xs = {inputs: torch.randn(rows, inputs).bfloat16() for inputs in {layer.in_features for layer in layers}}
    calls = [(layer, xs[layer.in_features]) for layer in layers]
    fastest = [float("inf")] * len(calls)
    until = time.monotonic() + seconds
    steps = 0
    while steps < LEAST_STEPS or time.monotonic() < until:
        for index, (layer, x) in enumerate(calls):
            before = time.perf_counter()
            layer(x)
            fastest[index] = min(fastest[index], time.perf_counter() - before)
        steps += 1
    return sum(fastest) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 128, 1024])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="for each figure")
    parser.add_argument("--head", action="store_true", help="of the head alone")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shapes = (HEAD,) if options.head else SHAPES * LAYERS
    print(f"| ms at rows | MB | {' | '.join(map(str, options.rows))} |")
    print("|---" * (len(options.rows) + 2) + "|")
    with torch.inference_mode():
        for name in options.forms:
            form = FORMS[name]
            if form is not None:
                check(form)
            layers = [random_layer(form, *shape) for shape in shapes]
            size = sum(layer.nbytes for layer in layers) / 1e6
            figures = (f"{measure(layers, rows, options.seconds):.3g}" for rows in options.rows)
            print(f"| {name} | {size:.0f} | {' | '.join(figures)} |", flush=True)
            del layers
            gc.collect()


if __name__ == "__main__":
    main()
