"""Sampling: greedy, with a temperature, and with top-k and top-p."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.ops.case import Case, Job, Model, Place
from dashinfer_kernels import SamplingBatch, SamplingState, sample
from dashinfer_kernels.sampling import reference

PARAMS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k and top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}
PROMPT = np.arange(4, dtype=np.int32)
CHECKED_ROWS = 8


def jobs(place: Place) -> list[Job]:
    model = place.models[0]
    return [
        Job("sampling", model, f"{rows} x {model.vocab}, {name}", partial(_build, place, model, rows, name), tokens=rows)
        for rows in ((2,) if place.toy else (1, 64, 256))
        for name in PARAMS
    ]


def _state(place: Place, model: Model, rows: int, name: str, device: torch.device) -> tuple[SamplingState, SamplingBatch]:
    state = SamplingState(rows, 16, model.vocab, device=device)
    for slot in range(rows):
        state.enter(slot, PROMPT, len(PROMPT), seed=slot, **PARAMS[name])
    return state, SamplingBatch.build(state, range(rows), [len(PROMPT)] * rows)


def _build(place: Place, model: Model, rows: int, name: str) -> Case:
    moved = rows * model.vocab * 4
    state, batch = _state(place, model, rows, name, place.device)
    sets = [place.normal(rows, model.vocab, dtype=torch.float32) * 3 for _ in range(place.copies(moved))]

    def verify() -> float:
        """The share of tokens that differ: sums are of integers, so the same tokens are asked for."""
        checked = min(rows, CHECKED_ROWS)
        other, other_batch = _state(place, model, checked, name, torch.device("cpu"))
        expected = reference.sample(sets[0][:checked].cpu().clone(), other, other_batch).tokens
        actual = sample(sets[0].clone(), state, batch).tokens
        return float((actual[:checked].cpu() != expected).double().mean())

    libraries = {
        "greedy": ("argmax", _argmax),
        "temperature": ("softmax, multinomial", _draw),
        "top-k and top-p": ("sort, multinomial", _cut),
    }
    label, library = libraries[name]
    return Case(
        calls=[partial(sample, logits, state, batch) for logits in sets],
        verify=verify,
        bytes_moved=moved,
        tolerance=0.0,
        libraries={label: [partial(library, logits) for logits in sets]},
    )


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _draw(logits: Tensor) -> Tensor:
    return torch.multinomial(torch.softmax(logits / 0.8, -1), 1)


def _cut(logits: Tensor) -> Tensor:
    """Top-k and top-p by a full sort, as it is commonly written in torch."""
    values, ids = torch.sort(logits / 0.8, descending=True)
    values[:, 50:] = float("-inf")
    weights = torch.softmax(values, -1)
    weights[weights.cumsum(-1) - weights > 0.9] = 0
    return ids.gather(1, torch.multinomial(weights, 1))
