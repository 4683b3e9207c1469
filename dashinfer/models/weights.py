"""Reading weights tensor by tensor, each once, and of each only this rank's share.

A `Source` is a set of files in one format under Hugging Face's tensor names; `WeightReader` puts what a layer asks for into one
tensor of the model's type and counts progress. There is never more than one layer's matrix beside the model in host memory.
Pickles are not read: loading one can run any code.
"""

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dashinfer.errors import ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    from dashinfer.models.linears import WeightFormat

# (stage, done, total, unit)
ReportProgress = Callable[[str, int, int, str], None]

_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # what safetensors calls the types that weights come in, and their bytes
# Tensors of layers that change nothing: tables that are computed here, and scales for a cache in 8 bits, which has its own.
_HARMLESS = ("rotary_emb.inv_freq", "attn_rot_embd.weight", ".k_scale", ".v_scale")
_SIZES = {**_FLOATS, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}  # any other: 1
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_REPORTS = 100  # progress is reported in steps of a hundredth


@dataclass(frozen=True)
class Part:
    """Some rows and columns of a tensor. `shape` is that of the whole tensor; None for rows or columns: all of them."""

    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @property
    def local_shape(self) -> tuple[int, ...]:
        start, stop = self.rows or (0, self.shape[0])
        if len(self.shape) == 1:
            return (stop - start,)
        first, last = self.columns or (0, self.shape[1])
        return (stop - start, last - first, *self.shape[2:])


class Source(Protocol):
    """Weight files. `sizes` maps each tensor's name to its bytes in the file; `on_device` says whether it fills tensors on any
    device, rather than in host memory only."""

    sizes: dict[str, int]
    on_device: bool

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype | None:
        """The type in the file; None for one that torch does not have."""
        ...

    def read_into(self, out: Tensor, part: Part) -> None:
        """Fill `out`, [*part.local_shape] of any float type. Raises UnsupportedModel for a type that cannot
        be read."""
        ...

    def read_stored(self, part: Part) -> Tensor:
        """[*part.local_shape] in host memory, of the type that the file has: what quantised weights are made of."""
        ...

    def close(self) -> None: ...


class WeightReader:
    """What layers load from: reads into `dtype` on `device`. Use it in a `with` block, which closes the files.

    Attributes:
        format: how the matrices of linear layers are read; None: as they are, into `dtype`.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: torch.dtype,
        device: torch.device,
        report: ReportProgress,
        format: "WeightFormat | None" = None,
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.format = format
        self._report = report
        self._total = sum(source.sizes.values())
        self._done = 0
        self._reported = -1
        self._used: set[str] = set()

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def __contains__(self, name: str) -> bool:
        return name in self.source.sizes

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that exists."""
        return self.source.shape(name)

    def stored_type(self, name: str) -> torch.dtype | None:
        """The type that the file has a tensor in; None for one that torch does not have."""
        return self.source.dtype(name)

    def read(self, *parts: Part, dtype: torch.dtype | None = None) -> Tensor:
        """The parts one below the other, on the device.

        Raises:
            UnsupportedModel: a tensor is missing, or has another shape than the model's config says.
        """
        for part in parts:
            self._check(part)
        rows = [part.local_shape[0] for part in parts]
        device = self.device if self.source.on_device else "cpu"
        out = torch.empty((sum(rows), *parts[0].local_shape[1:]), dtype=dtype or self.dtype, device=device)
        for part, piece in zip(parts, out.split(rows), strict=True):
            self.source.read_into(piece, part)
            self._count(part.name)
        return out.to(self.device)

    def read_stored(self, part: Part) -> Tensor:
        """The part in the file's own type, on the device; raises as `read`."""
        self.take(part)
        return self.source.read_stored(part).to(self.device)

    def take(self, part: Part) -> None:
        """The part is there and will be read by somebody else; raises as `read`."""
        self._check(part)
        self._count(part.name)

    def skip(self, *names: str) -> None:
        """These tensors are accounted for, though nobody reads them; those that do not exist are no matter."""
        for name in names:
            if name in self:
                self._count(name)

    def _check(self, part: Part) -> None:
        if part.name not in self.source.sizes:
            raise UnsupportedModel(f"the weights lack the tensor {part.name}; the files may be incomplete")
        if (found := self.source.shape(part.name)) != part.shape:
            raise UnsupportedModel(
                f"the tensor {part.name} has the shape {list(found)}, but the model's config makes it {list(part.shape)}"
            )

    def finish(self, num_layers: int) -> None:
        """All is loaded.

        Raises:
            UnsupportedModel: the files have a tensor of one of the `num_layers` layers that nobody asked for: the model would
                run without it and answer nonsense.
        """
        for name in sorted(self.source.sizes.keys() - self._used):
            layer = re.match(r"(?:model\.layers|blk|visual\.blocks)\.(\d+)\.", name)
            if layer and int(layer[1]) < num_layers and not name.endswith(_HARMLESS) and not self._adds_nothing(name):
                raise UnsupportedModel(f"the weights have the tensor {name}, which the model's config does not account for")
        self._report("weights", self._total, self._total, "B")

    def _adds_nothing(self, name: str) -> bool:
        """Quantisers of GPTQ's early days gave every linear layer a bias."""
        if not name.endswith(".bias") or self.source.dtype(name) is None:
            return False
        return not self.source.read_stored(Part(name, self.source.shape(name))).any()

    def _count(self, name: str) -> None:
        if name in self._used:
            return
        self._used.add(name)
        self._done += self.source.sizes[name]
        if (step := self._done * _REPORTS // self._total) > self._reported and self._done < self._total:
            self._reported = step
            self._report("weights", self._done, self._total, "B")


class SafetensorsSource:
    """One or more .safetensors files that hold a model together."""

    on_device = False

    def __init__(self, paths: tuple[str, ...]) -> None:
        self.sizes: dict[str, int] = {}
        self._files: dict[str, safe_open] = {}
        self._stack = ExitStack()
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, path: str) -> None:
        if Path(path).suffix != ".safetensors":
            raise UnsupportedModel(f"{path} is not a .safetensors file; other checkpoints can run code when they are loaded")
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise ModelNotFound(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise ModelNotFound(f"{path} cannot be read, or is incomplete: {error}") from None
        for name in file.keys():  # noqa: SIM118  not a dict
            entry = file.get_slice(name)
            size = _SIZES.get(entry.get_dtype(), 1)
            for length in entry.get_shape():
                size *= length
            self.sizes[name] = size
            self._files[name] = file

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        return _TYPES.get(self._files[name].get_slice(name).get_dtype())

    def read_into(self, out: Tensor, part: Part) -> None:
        if (kind := self._files[part.name].get_slice(part.name).get_dtype()) not in _FLOATS:
            raise UnsupportedModel(
                f"the tensor {part.name} is of the type {kind}, but the model's config does not say how it is quantised"
            )
        out.copy_(self.read_stored(part))

    def read_stored(self, part: Part) -> Tensor:
        file = self._files[part.name]
        if part.rows is None and part.columns is None:
            return file.get_tensor(part.name)
        entry = file.get_slice(part.name)
        rows = slice(*part.rows) if part.rows else slice(None)
        return entry[rows, slice(*part.columns)] if part.columns else entry[rows]

    def close(self) -> None:
        self._stack.close()


class DummySource:
    """Random weights of whatever shape is asked for: measures speed and memory without a model's files."""

    on_device = True

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
        generator = torch.Generator().manual_seed(0)
        # repeated to any size; the odd length keeps rows different. Drawing billions of numbers would take minutes.
        self._noise = torch.randn((1 << 20) - 3, generator=generator) * 0.02

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return torch.bfloat16

    def read_into(self, out: Tensor, part: Part) -> None:
        if re.search(r"(norm\d?|ln_q)\.weight$", part.name):
            out.fill_(1)
            return
        noise = self._noise = self._noise.to(out.device)
        for piece in out.view(-1).split(noise.numel()):
            piece.copy_(noise[: piece.numel()])

    def read_stored(self, part: Part) -> Tensor:
        raise UnsupportedModel("random weights are not quantised; leave out --load-format dummy")

    def close(self) -> None:
        pass
