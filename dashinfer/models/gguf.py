"""GGUF files as a source of weights under Hugging Face's names, one tensor at a time, unpacked by several threads.

The metadata is turned into a config elsewhere; only the architecture matters here, since files of `llama` store the rows of
queries and keys in another order.
"""

import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.gguf_header import TensorInfo, read_header
from dashinfer.models.dequantize import code_bits, dequantize, unpack
from dashinfer.models.linears import WeightFormat
from dashinfer.models.weights import Part, WeightReader
from dashinfer_kernels import QuantizedWeight

T = TypeVar("T")

# divides the rotary frequencies where a file has it (Llama 3.1 and later); it keeps its GGUF name
ROPE_FACTORS = "rope_freqs.weight"

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK = 1 << 18  # weights unpacked at a time: few enough to stay in a core's cache between the steps of unpacking
_MAX_THREADS = 8  # more would wait for Python's lock


@dataclass(frozen=True)
class _Entry:
    file: BinaryIO
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the file's start

    @property
    def row_bytes(self) -> int:
        weights, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // weights * size

    @property
    def nbytes(self) -> int:
        return self.row_bytes * (self.shape[0] if len(self.shape) == 2 else 1)


class GGUFSource:
    """One or more .gguf files that hold a model together.

    Args:
        head_dim: of the model; rows of queries and keys are reordered by heads.

    Raises:
        ModelNotFound: a file is missing.
        UnsupportedModel: it is none of GGUF, cut short or damaged; or a version, or a type of tensor, is not known.
    """

    on_device = False

    def __init__(self, paths: tuple[str, ...], *, head_dim: int) -> None:
        self._head_dim = head_dim
        self._entries: dict[str, _Entry] = {}
        self._files: list[BinaryIO] = []
        self._architecture = ""
        # Threads with a chunk each, rather than torch's threads within each of a chunk's small operations: the latter wait for
        # one another after every operation, for milliseconds where another process has one of the cores.
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(
            min(self._threads, _MAX_THREADS), "gguf", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            for path in paths:
                self._open(path)
        except BaseException:
            self.close()
            raise
        self.sizes = {name: entry.nbytes for name, entry in self._entries.items()}

    def _open(self, path: str) -> None:
        try:
            file = Path(path).open("rb", buffering=0)  # noqa: SIM115  closed by close()
        except OSError as error:
            raise ModelNotFound(f"{path}: {error.strerror}") from None
        self._files.append(file)
        header = read_header(Path(path), lists=False)
        self._architecture = header.metadata.get("general.architecture", self._architecture)
        for name, info in header.tensors.items():
            self._entries[_hf_name(name)] = _entry(file, name, info)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype | None:
        return None

    def read_into(self, out: Tensor, part: Part) -> None:
        entry = self._entries[part.name]
        if len(entry.shape) == 1:
            row = self._rows(entry, 0, 1)[0]
            out.copy_(self._reorder(part.name, row[slice(*part.rows)] if part.rows else row))
            return
        start = part.rows[0] if part.rows else 0
        columns = slice(*part.columns) if part.columns else slice(None)

        def chunk(first: int, last: int) -> None:
            rows = self._rows(entry, first, last)[:, columns]
            out[first - start : last - start].copy_(self._reorder(part.name, rows))

        for _ in self._chunks(entry, part, chunk):
            pass  # an exception of a chunk is raised here

    def read_stored(self, part: Part) -> Tensor:
        raise UnsupportedModel(f"the tensor {part.name} cannot be read as the .gguf file stores it")

    def bits_per_weight(self, *, on_cpu: bool, kept: int | None = None, others: float = 16) -> float:
        """Of matrices as layers keep what `read_codes` gives, codes, scales and offsets; `others` where it gives nothing, or
        codes of other bits than are `kept` (None: all are).

        On CPU 8 bits are two planes of 4, with scales each. On a GPU those of the K formats need more than 16 bits.
        """
        found, weights = 0, 0
        for name, entry in self._entries.items():
            if name.endswith("_proj.weight"):
                bits = code_bits(entry.kind)
                doubled = bits == 8 if on_cpu else entry.kind.name.endswith("_K")
                weights += math.prod(entry.shape)
                own = bits is not None and kept in (None, bits)
                found += math.prod(entry.shape) * (bits + (2 if doubled else 1) if own else others)
        return found / max(1, weights)

    def code_bits(self, name: str) -> int | None:
        """Of the codes that `read_codes` gives: 4 or 8; None where it gives none."""
        return code_bits(self._entries[name].kind)

    def group_size(self, name: str) -> int:
        """Weights of a row that share a scale in what `read_codes` gives."""
        entry = self._entries[name]
        _, scales, _ = unpack(self._stored(entry, 0, 1), entry.kind)
        return entry.shape[1] // scales.numel()

    def read_codes(self, part: Part) -> QuantizedWeight:
        """A matrix's share in the file's own codes, in host memory; the file keeps it in a format that has `code_bits`.

        Raises:
            UnsupportedModel: the share cuts a group.
        """
        entry = self._entries[part.name]
        bits = code_bits(entry.kind)
        assert bits is not None
        columns = part.local_shape[1]

        def chunk(first: int, last: int) -> list[Tensor | None]:
            groups = unpack(self._stored(entry, first, last), entry.kind)
            return [None if each is None else self._reorder(part.name, each.reshape(last - first, -1)) for each in groups]

        codes, scales, offsets = (
            None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*self._chunks(entry, part, chunk), strict=True)
        )
        size = entry.shape[1] // scales.shape[1]
        if part.columns:
            if part.columns[0] % size or part.columns[1] % size:
                raise UnsupportedModel(
                    f"{part.name} has a scale for {size} weights each, which a share of {columns} inputs cuts"
                )
            codes = codes[:, slice(*part.columns)]
            groups = slice(part.columns[0] // size, part.columns[1] // size)
            scales, offsets = scales[:, groups], None if offsets is None else offsets[:, groups]
        return QuantizedWeight(codes=codes, scales=scales, offsets=offsets, bits=bits, group_size=size)

    def _chunks(self, entry: _Entry, part: Part, read: Callable[[int, int], T]) -> Iterator[T]:
        """`read(first row, last)` of a part, some rows at a time, by several threads; the results in order."""
        start, stop = part.rows or (0, entry.shape[0])
        # whole heads at a time, so that reordering stays within a chunk
        step = max(1, _CHUNK // (entry.shape[1] * self._head_dim)) * self._head_dim
        firsts = range(start, stop, step)
        return self._pool.map(read, firsts, [min(first + step, stop) for first in firsts])

    def _rows(self, entry: _Entry, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor: [rows, columns]."""
        return dequantize(self._stored(entry, start, stop), entry.kind)

    def _stored(self, entry: _Entry, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor as they are stored: [rows, bytes]."""
        data = torch.empty((stop - start) * entry.row_bytes, dtype=torch.uint8)
        view, offset = memoryview(data.numpy()), entry.offset + start * entry.row_bytes
        while view:
            count = os.preadv(entry.file.fileno(), [view], offset)
            if not count:
                raise ModelNotFound(f"{entry.file.name} ended while it was read")
            view, offset = view[count:], offset + count
        return data.view(stop - start, -1)

    def _reorder(self, name: str, rows: Tensor) -> Tensor:
        """`llama` files pair neighbouring rows of a head for the rotation, Hugging Face's pair its halves."""
        if self._architecture != "llama" or not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return rows
        rest = rows.shape[1:]
        return rows.reshape(-1, self._head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)

    def close(self) -> None:
        self._pool.shutdown()
        torch.set_num_threads(self._threads)  # the pool's threads changed what threads to come start with
        for file in self._files:
            file.close()


class GGUFFormat(WeightFormat):
    """Matrices in the codes that the file has, where there is a layout for them.

    Args:
        bits: 4 to take the file's codes of 4 bits only; None: all.
        others: how matrices without such codes are read; None: in 16 bits.
        wide_copy: as of every format.
    """

    rounds_head = True

    def __init__(
        self,
        source: GGUFSource,
        *,
        bits: int | None = None,
        others: WeightFormat | None = None,
        wide_copy: bool = False,
    ) -> None:
        self._source, self._bits, self._others = source, bits, others
        self.wide_copy = wide_copy

    def read(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        if (own := self._own(reader, part, self._bits)) is not None or self._others is None:
            return own
        return self._others.read(reader, part)

    def read_head(self, reader: WeightReader, part: Part) -> QuantizedWeight | None:
        if (own := self._own(reader, part, None)) is not None or self._others is None:
            return own
        return self._others.read_head(reader, part)

    def steps(self, reader: WeightReader, part: Part) -> tuple[int, int]:
        if self._has_own(reader, part, self._bits):
            return 1, self._source.group_size(part.name)
        return (1, 1) if self._others is None else self._others.steps(reader, part)

    def _has_own(self, reader: WeightReader, part: Part, bits: int | None) -> bool:
        found = self._source.code_bits(part.name) if part.name in reader else None
        return found is not None and bits in (None, found)

    def _own(self, reader: WeightReader, part: Part, bits: int | None) -> QuantizedWeight | None:
        if not self._has_own(reader, part, bits):
            return None
        reader.take(part)
        return self._source.read_codes(part).to(reader.device)


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; one that has none keeps its own."""
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    return name


def _entry(file: BinaryIO, name: str, info: TensorInfo) -> _Entry:
    kind, shape = info.type, tuple(reversed(info.shape))
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise UnsupportedModel(f"the GGUF tensor {name} has the unknown type {kind}; a newer `gguf` may know it") from None
    if len(shape) not in (1, 2) or shape[-1] % GGML_QUANT_SIZES[known][0]:
        raise UnsupportedModel(f"the GGUF tensor {name} has the shape {list(shape)}, which is not supported for {known.name}")
    return _Entry(file, known, shape, info.offset)
