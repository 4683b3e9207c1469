"""Rotary embedding fused with the write to the paged cache."""

from functools import partial

import torch
from torch import Tensor

from bench.ops.attention import BLOCK_SIZE
from bench.ops.case import Case, Job, Model, Place, poisoned, relative_error, token_jobs
from dashinfer_kernels import rope_kv_write
from dashinfer_kernels.rope import reference

MAX_POSITIONS = 8192


def jobs(place: Place) -> list[Job]:
    return token_jobs(place, {"rope_kv_write": _build})


def _build(place: Place, model: Model, tokens: int) -> Case:
    columns = (model.heads + 2 * model.kv_heads) * model.head_dim
    moved = tokens * (2 * columns * place.dtype.itemsize + model.head_dim * 4 + 2 * 8)
    blocks = -(-tokens // BLOCK_SIZE) + 1
    sizes = {"num_heads": model.heads, "num_kv_heads": model.kv_heads, "head_dim": model.head_dim}
    norms = {"q_norm": None, "k_norm": None, "eps": 1e-6}
    angles = torch.rand(MAX_POSITIONS, model.head_dim // 2, device=place.device) * 6.28
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)

    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        slots = torch.randperm(blocks * BLOCK_SIZE, device=place.device)[:tokens]
        positions = torch.randint(MAX_POSITIONS, (tokens,), device=place.device)
        cache = torch.zeros(blocks, 2, model.kv_heads, BLOCK_SIZE, model.head_dim, dtype=place.dtype, device=place.device)
        return place.normal(tokens, columns), positions, cos_sin, cache, slots

    sets = [inputs() for _ in range(place.copies(moved))]

    def verify() -> float:
        qkv, positions, _, cache, slots = sets[0]
        expected_cache = cache.to(torch.float64)
        expected = reference.rope_kv_write(qkv.to(torch.float64), positions, cos_sin, expected_cache, slots, **sizes, **norms)
        with poisoned():
            q = rope_kv_write(qkv.clone(), positions, cos_sin, cache, slots, **sizes)
        return max(relative_error(q, expected), relative_error(cache, expected_cache))

    return Case(calls=[partial(rope_kv_write, *each, **sizes) for each in sets], verify=verify, bytes_moved=moved)
