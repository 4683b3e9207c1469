"""Bidirectional attention within sequences, at the sizes of vision towers."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops.attention import BACKENDS
from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error
from dashinfer_kernels import varlen_attention
from dashinfer_kernels.varlen_attention import reference

TOWERS = (
    Model("Qwen2.5-VL vision", 1280, 3420, 16, 16, 80, 0),
    Model("SigLIP so400m", 1152, 4304, 16, 16, 72, 0),
)
CHECKED_TOKENS = 2048


def jobs(place: Place) -> list[Job]:
    towers = (Model("toy vision", 64, 96, 2, 2, 16, 0),) if place.toy else TOWERS
    shapes = ((3, 9),) if place.toy else ((4, 4096), (256, 64), (1, 16384))
    return [
        Job(
            "varlen_attention",
            tower,
            f"{sequences} x {length}",
            partial(_build, place, tower, sequences, length),
            tokens=sequences * length,
        )
        for tower in towers
        for sequences, length in shapes
    ]


def _build(place: Place, tower: Model, sequences: int, length: int) -> Case:
    tokens, heads, head_dim = sequences * length, tower.heads, tower.head_dim
    scale = head_dim**-0.5
    moved = 4 * tokens * heads * head_dim * place.dtype.itemsize
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32, device=place.device) * length
    sets = [place.normal(tokens, 3, heads, head_dim) for _ in range(place.copies(moved))]

    def call(qkv: Tensor) -> Tensor:
        return varlen_attention(*qkv.unbind(1), cu_seqlens, length, scale=scale)

    def verify() -> float:
        whole = max(1, CHECKED_TOKENS // length)  # sequences, the last ones
        begin = max(0, tokens - whole * length)
        bounds = torch.arange(0, tokens - begin + 1, length, dtype=torch.int32)
        part = sets[0][begin:].to(torch.float64).unbind(1)
        with poisoned():
            out = call(sets[0])
        if not out.isfinite().all():
            return float("inf")
        return relative_error(out[begin:], reference.varlen_attention(*part, bounds, scale=scale))

    def library(backend: SDPBackend, qkv: Tensor) -> Tensor:
        q, k, v = (part.view(sequences, length, heads, head_dim).transpose(1, 2) for part in qkv.unbind(1))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return Case(
        calls=[partial(call, each) for each in sets],
        verify=verify,
        bytes_moved=moved,
        flops=4 * tokens * length * heads * head_dim,
        tolerance=2e-2,
        libraries={}
        if place.toy
        else {name: [partial(library, backend, each) for each in sets] for name, backend in BACKENDS.items()},
    )
