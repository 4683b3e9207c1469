"""Reading the head of a .gguf file: its metadata and the list of its tensors.

On both sides: the parent makes a configuration and a tokeniser of the metadata, a rank looks for its tensors. An own reader,
and not the one of the `gguf` package, since the parent process must stay small and both must start fast: that one needs NumPy
and makes an array for every string. Reads versions 2 and 3, little endian. Knows nothing of what the keys mean.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dashinfer.errors import ModelNotFound, UnsupportedModel

# GGML tensor type to (values a block, bytes a block).
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
}

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_MOST_ITEMS = 1 << 24  # of an array or of the file's lists: beyond any model, below any memory


@dataclass(frozen=True)
class TensorInfo:
    shape: tuple[int, ...]  # as in the file: the fastest dimension first
    type: int  # GGML's number
    offset: int  # bytes from the file's begin


@dataclass(frozen=True)
class GGUFHeader:
    metadata: dict[str, Any]  # arrays as lists
    tensors: dict[str, TensorInfo]


class _Cut(Exception):
    """The file ends before its data does."""


class _Cursor:
    def __init__(self, data: mmap.mmap, where: Path) -> None:
        self.data = data
        self.at = 0
        self.where = where

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise _Cut
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self) -> int:
        count = self.number("Q")
        if count > _MOST_ITEMS:
            raise UnsupportedModel(f"{self.where} is damaged: it claims a list of {count} items")
        return count

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def scalar(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        number = self.number(self.code(kind))
        return bool(number) if kind == _BOOL else number

    def code(self, kind: int) -> str:
        if kind == _ARRAY:
            raise UnsupportedModel(f"{self.where} has a list of lists in its metadata, as no model that can be served has")
        if kind not in _SCALARS:
            raise UnsupportedModel(f"{self.where} is damaged: it has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.count()
        if kind == _STRING:
            return self.strings(count)
        code = self.code(kind)
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))

    def skip_array(self) -> None:
        kind, count = self.number("I"), self.count()
        if kind != _STRING:
            self.at += count * struct.calcsize("<" + self.code(kind))
            return
        data, at, length_at, last = self.data, self.at, struct.Struct("<Q").unpack_from, len(self.data) - 8
        for _ in range(count):
            if at > last:
                raise _Cut
            at += 8 + length_at(data, at)[0]
        self.at = at

    def strings(self, count: int) -> list[str]:
        """The same as `string` in a loop, without a call for each of the hundred thousands."""
        data, at, length_at, found = self.data, self.at, struct.Struct("<Q").unpack_from, []
        end_of_file = len(data)
        for _ in range(count):
            if at + 8 > end_of_file:
                raise _Cut
            (length,) = length_at(data, at)
            at += 8
            if at + length > end_of_file:
                raise _Cut
            found.append(data[at : at + length].decode("utf-8", "replace"))
            at += length
        self.at = at
        return found


def read_header(path: Path, *, lists: bool = True) -> GGUFHeader:
    """Metadata and tensors of one file, and a check that the file is as long as they say.

    Args:
        lists: whether the metadata's lists are wanted: skipping the vocabulary takes a fraction of the time of reading it.

    Raises:
        ModelNotFound: the file cannot be read.
        UnsupportedModel: it is no GGUF file, of another version, cut short or damaged.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                hint = "; it is a Git LFS pointer, fetch the file itself" if magic == b"vers" else ""
                raise UnsupportedModel(f"{path} is not a GGUF file{hint}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Cursor(data, path), lists)
    except _Cut:
        raise UnsupportedModel(f"{path} is cut short: fetch it again") from None
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error


def _read(cursor: _Cursor, lists: bool) -> GGUFHeader:
    cursor.take(4)
    version = cursor.number("I")
    if version not in (2, 3):
        endian = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
        raise UnsupportedModel(f"{cursor.where} is {endian}; GGUF versions 2 and 3, little endian, can be read")
    tensor_count, value_count = cursor.count(), cursor.count()
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key, kind = cursor.string(), cursor.number("I")
        if kind != _ARRAY:
            metadata[key] = cursor.scalar(kind)
        elif lists:
            metadata[key] = cursor.array()
        else:
            cursor.skip_array()

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise UnsupportedModel(f"{cursor.where} is damaged: its alignment is {alignment!r}")
    listed = []
    for _ in range(tensor_count):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > 8:
            raise UnsupportedModel(f"{cursor.where} is damaged: tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))
        listed.append((name, shape, cursor.number("I"), cursor.number("Q")))
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: TensorInfo(shape, kind, start + offset) for name, shape, kind, offset in listed}
    for info in tensors.values():
        values, size = BLOCKS.get(info.type, (1, 0))
        if info.offset + math.prod(info.shape) // values * size > len(cursor.data):
            raise _Cut
    return GGUFHeader(metadata, tensors)


def read_floats(path: Path, info: TensorInfo) -> array:
    """A small F32 tensor's values. `info` from the header of the same file."""
    assert info.type == 0
    values = array("f")
    with path.open("rb") as file:
        file.seek(info.offset)
        values.frombytes(file.read(4 * math.prod(info.shape)))
    return values
