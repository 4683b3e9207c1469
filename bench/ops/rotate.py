"""Rotation of queries and keys in place, as vision towers do it: all heads of a model, in a product with its values."""

from functools import partial

import torch

from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error, token_jobs
from dashinfer_kernels import rotate_heads
from dashinfer_kernels.rotate import reference


def jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"rotate_heads": _build})


def _build(place: Place, model: Model, tokens: int) -> Case:
    rotated = 2 * model.heads
    moved = tokens * (2 * rotated * model.head_dim * place.dtype.itemsize + model.head_dim * 4)
    turns = torch.rand(tokens, model.head_dim // 2, device=place.device) * 6.28
    angles = torch.cat((turns.cos(), turns.sin()), 1)
    sets = [place.normal(tokens, 3 * model.heads, model.head_dim)[:, :rotated] for _ in range(place.copies(moved))]

    def verify() -> float:
        expected, heads = sets[0].to(torch.float64), sets[0].clone()
        reference.rotate_heads(expected, angles)
        with poisoned():
            rotate_heads(heads, angles)
        return relative_error(heads, expected)

    return Case(calls=[partial(rotate_heads, heads, angles) for heads in sets], verify=verify, bytes_moved=moved)
