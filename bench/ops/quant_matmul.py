"""Linear layers over weights of few bits, each mode beside `F.linear` in 16 bits, over the layers of a decoder.

`MODES` is a table of what makes the layer of a mode; whoever adds a kernel adds a line.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from bench.ops.case import MODELS, Case, Job, Mark, Model, Place, poisoned, relative_error
from dashinfer_kernels import Linear, QuantizedWeight, pack_quantized
from dashinfer_kernels.quant_matmul.reference import Activations, quantized_linear
from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES

CHECKED_ROWS, CHECKED_OUTPUTS = 16, 512
FEW_ROWS = (1, 16)
ROWS = (*FEW_ROWS, 64, 256, 4096)
LIBRARY = "cuBLAS bf16"


@dataclass(frozen=True)
class Mode:
    """How weights and activations are kept, and what is asked of few and of very many rows.

    Attributes:
        bits: of a code.
        group_size: inputs that share a scale; None: a whole row.
        zeros: unsigned codes, whole numbers of which stand for 0.
        float8: E4M3 rather than integers.
        block_rows: outputs that share scales.
    """

    bits: int
    group_size: int | None = None
    zeros: bool = False
    float8: bool = False
    block_rows: int = 1
    activations: Activations | None = None
    few: tuple[Mark, ...] = ()
    many: tuple[Mark, ...] = ()


def _faster(ratio: float) -> Mark:
    return Mark(f">= {ratio}x cuBLAS bf16", LIBRARY, ratio)


_FOUR_BITS = (_faster(3.0), Mark(">= 65% of copy bandwidth", "fraction", 0.65))
_ALMOST = (_faster(0.9),)
MODES = {
    "a16w4": Mode(bits=4, group_size=128, zeros=True, few=_FOUR_BITS, many=_ALMOST),
    "a16w4 group 32": Mode(bits=4, group_size=32, zeros=True),
    "a16w4 symmetric": Mode(bits=4, group_size=128),
    "a16w8": Mode(bits=8, few=(_faster(1.7),), many=_ALMOST),
    "a16w8 group 128": Mode(bits=8, group_size=128),
    "fp8 weights": Mode(bits=8, float8=True, few=(_faster(1.7),), many=_ALMOST),
    "fp8 weights, blocks": Mode(bits=8, float8=True, group_size=128, block_rows=128),
}


def layers(model: Model) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a block's layers."""
    attention = model.heads * model.head_dim
    return {
        "qkv": (attention + 2 * model.kv_heads * model.head_dim, model.hidden),
        "o": (model.hidden, attention),
        "gate_up": (2 * model.intermediate, model.hidden),
        "down": (model.hidden, model.intermediate),
    }


def jobs(place: Place) -> list[Job]:
    models = place.models if place.toy else [model for model in MODELS if model.name.startswith("Qwen2.5")]
    return [
        Job(
            f"quant_matmul {name}",
            model,
            f"{layer}: {rows} x {shape[1]} x {shape[0]}",
            partial(_build, place, mode, shape, rows),
            # small layers take the time of a launch whatever their weights
            (mode.few if rows in FEW_ROWS else mode.many if rows == ROWS[-1] else ()) if layer == "gate_up" else (),
            rows,
        )
        for model in models
        for name, mode in MODES.items()
        for layer, shape in layers(model).items()
        for rows in ((3,) if place.toy else ROWS)
        if layer in ("gate_up", "down") or (mode.few and rows in FEW_ROWS)
    ]


def weight_only_jobs(place: Place) -> list[Job]:
    """Those that leave activations as they are and that a mark is set for, or, in a toy place, any."""
    names = {f"quant_matmul {name}" for name, mode in MODES.items() if mode.activations is None}
    return [job for job in jobs(place) if job.op in names and (job.marks or place.toy)]


def make_weight(place: Place, mode: Mode, shape: tuple[int, int]) -> QuantizedWeight:
    """Random codes; values of the size that a model's have."""
    outputs, inputs = shape
    size = mode.group_size or inputs
    groups = (-(-outputs // mode.block_rows), -(-inputs // size))
    spread = 64.0 if mode.float8 else 2.0 ** (mode.bits - 2)
    scales = (0.5 + torch.rand(groups, device=place.device)) / (spread * inputs**0.5)
    scales = scales.half().float()
    options = {"scales": scales, "group_size": size, "bits": mode.bits, "block_rows": mode.block_rows}
    if mode.float8:
        codes = (spread * place.normal(*shape, dtype=torch.float32)).clamp_(-448.0, 448.0).to(FLOAT8)
        return QuantizedWeight(codes=codes, **options)
    if mode.zeros:
        codes = torch.randint(0, 2**mode.bits, shape, dtype=torch.uint8, device=place.device)
        zeros = torch.randint(6, 10, groups, device=place.device)
        return QuantizedWeight(codes=codes, offsets=-zeros * scales, **options)
    least, most = RANGES[mode.bits]
    return QuantizedWeight(codes=torch.randint(least, most + 1, shape, dtype=torch.int8, device=place.device), **options)


def _build(place: Place, mode: Mode, shape: tuple[int, int], rows: int) -> Case:
    outputs, inputs = shape
    itemsize = place.dtype.itemsize
    weight = make_weight(place, mode, shape)
    pack = partial(pack_quantized, dtype=place.dtype, activations=mode.activations)
    first = pack(weight)
    moved = first.nbytes + rows * (inputs + outputs) * itemsize
    copies = range(place.copies(moved))
    packed: list[Linear] = [first, *(pack(make_weight(place, mode, shape)) for _ in copies[1:])]
    xs = [place.normal(rows, inputs) for _ in copies]
    plain = [place.normal(*shape) for _ in range(place.copies(outputs * inputs * itemsize))]

    checked = min(outputs, CHECKED_OUTPUTS)
    part = QuantizedWeight(
        codes=weight.codes[:checked],
        scales=weight.scales[: -(-checked // weight.block_rows)],
        offsets=None if weight.offsets is None else weight.offsets[:checked],
        bits=weight.bits,
        group_size=weight.group_size,
        block_rows=weight.block_rows,
    )
    expected = quantized_linear(xs[0][:CHECKED_ROWS].double(), part, None, mode.activations)
    del weight, part

    def verify() -> float:
        with poisoned():
            return relative_error(first(xs[0])[:CHECKED_ROWS, :checked], expected)

    calls: list[Callable[[], torch.Tensor]] = [partial(layer, x) for layer, x in zip(packed, xs, strict=True)]
    return Case(
        calls=calls,
        verify=verify,
        bytes_moved=moved,
        flops=2 * rows * inputs * outputs,
        libraries={LIBRARY: [partial(F.linear, xs[index % len(xs)], each) for index, each in enumerate(plain)]},
    )
