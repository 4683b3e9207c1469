"""The two models in a vision-language checkpoint, each as a source of its own: decoder and tower.

Older files keep the decoder beside the tower, `model.*` and `visual.*`, newer ones both within a model,
`model.language_model.*` and `model.visual.*`. Here they have the older names.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dashinfer.models.weights import Part, Source

_TOWER = ("visual.", "model.visual.")


class _Selected:
    """Some tensors of a source under other names."""

    def __init__(self, source: Source, names: dict[str, str]) -> None:
        """`names`: what each tensor is called in the source, by its name here."""
        self.sizes = {name: source.sizes[stored] for name, stored in names.items()}
        self.on_device = source.on_device
        self._source = source
        self._names = names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name])

    def dtype(self, name: str) -> torch.dtype | None:
        return self._source.dtype(self._names[name])

    def read_into(self, out: Tensor, part: Part) -> None:
        self._source.read_into(out, replace(part, name=self._names[part.name]))

    def read_stored(self, part: Part) -> Tensor:
        return self._source.read_stored(replace(part, name=self._names[part.name]))

    def close(self) -> None:
        self._source.close()


def decoder_part(source: Source) -> Source:
    """The decoder's tensors, as `model.layers...` and `lm_head`."""
    names = {}
    for stored in source.sizes:
        if not stored.startswith(_TOWER):
            inner = stored.removeprefix("model.language_model.")
            names[stored if inner == stored else f"model.{inner}"] = stored
    return _Selected(source, names)


def tower_part(source: Source) -> Source:
    """The tower's tensors, as `visual...`."""
    return _Selected(source, {name.removeprefix("model."): name for name in source.sizes if name.startswith(_TOWER)})
