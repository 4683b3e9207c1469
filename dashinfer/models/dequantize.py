"""GGUF's block formats, taken apart: torch versions of the common ones, `gguf.quants` for the rest.

A format cuts a row into blocks of 32 or 256 weights, and these into groups with a scale each and, in some, an offset. The
functions here take blocks as [blocks, bytes of a block] uint8. What they make of a file as float32 has the very bits that
`gguf.quants` gives; they are several times as fast, and loading a model from a .gguf file takes about as long as they do. The
byte layouts are those of ggml-common.h in ggml.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from dashinfer.errors import UnsupportedModel

Kind = GGMLQuantizationType
_PLAIN = {Kind.F64: torch.float64, Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


class Groups(NamedTuple):
    """`codes * scales + offsets`.

    Attributes:
        codes: [blocks, groups, weights of a group], int8, or uint8 where there are offsets.
        scales: [blocks, groups, 1] float32.
        offsets: the same, or None.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None


def dequantize(data: Tensor, kind: GGMLQuantizationType) -> Tensor:
    """Rows of weights.

    Args:
        data: [rows, bytes of a row] uint8, contiguous.

    Returns:
        [rows, weights of a row] of the file's own type if it is not quantised, else float32.

    Raises:
        UnsupportedModel: a format that nobody here knows.
    """
    if (dtype := _PLAIN.get(kind)) is not None:
        return data.view(dtype)
    rows = data.shape[0]
    if kind in _UNPACK:
        codes, scales, offsets = unpack(data, kind)
        values = codes.float().mul_(scales)
        return (values if offsets is None else values.add_(offsets)).view(rows, -1)
    try:
        return torch.from_numpy(gguf_dequantize(data.numpy(), kind)).view(rows, -1)
    except NotImplementedError:
        raise UnsupportedModel(f"GGUF tensors of the type {kind.name} are not supported") from None


def code_bits(kind: GGMLQuantizationType) -> int | None:
    """Bits that `unpack`'s codes fit into, 4 or 8; None: `unpack` does not know the format."""
    return _UNPACK[kind][0] if kind in _UNPACK else None


def unpack(data: Tensor, kind: GGMLQuantizationType) -> Groups:
    """The codes of a format for which `code_bits` has an answer, and what they stand for. `data` as of `dequantize`."""
    return _UNPACK[kind][1](data.view(-1, GGML_QUANT_SIZES[kind][1]))


def _half(blocks: Tensor, start: int) -> Tensor:
    """[blocks, 1, 1] float32: the half-precision number at byte `start` of each block."""
    return blocks[:, start : start + 2].view(torch.float16).float().unsqueeze(2)


def _nibbles(codes: Tensor) -> Tensor:
    """[n, m] uint8 -> [n, 2, m]: the low four bits of each byte, then the high ones."""
    return torch.stack((codes & 15, codes >> 4), dim=1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """[blocks, 1, 32] uint8: bit i of the 32-bit number at byte `start`, as 0 or 16."""
    bits = blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return ((bits & 1) << 4).view(-1, 1, 32)


def _signed(codes: Tensor, zero: int) -> Tensor:
    """Codes that count from `zero` (a power of two above all of them / 2) as int8."""
    return codes.view(torch.int8).sub_(zero)


def _q4_0(blocks: Tensor) -> Groups:
    return Groups(_signed(_nibbles(blocks[:, 2:]).view(-1, 1, 32), 8), _half(blocks, 0))


def _q4_1(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[:, 4:]).view(-1, 1, 32), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Tensor) -> Groups:
    codes = _nibbles(blocks[:, 6:]).view(-1, 1, 32).bitwise_or_(_fifth_bits(blocks, 2))
    return Groups(_signed(codes, 16), _half(blocks, 0))


def _q5_1(blocks: Tensor) -> Groups:
    codes = _nibbles(blocks[:, 8:]).view(-1, 1, 32).bitwise_or_(_fifth_bits(blocks, 4))
    return Groups(codes, _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Tensor) -> Groups:
    return Groups(blocks[:, 2:].view(torch.int8).unsqueeze(1), _half(blocks, 0))


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: [blocks, 8, 1] float32 each. Bytes 4 to 16 pack eight scales and eight minima of six bits."""
    packed = blocks[:, 4:16]
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((scales & 63, (rest & 15) | ((scales >> 2) & 48)), dim=1).unsqueeze(2)
    minima = torch.cat((minima & 63, (rest >> 4) | ((minima >> 2) & 48)), dim=1).unsqueeze(2)
    return scales * _half(blocks, 0), -(minima * _half(blocks, 2))


def _q4_k(blocks: Tensor) -> Groups:
    return Groups(_nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 8, 32), *_scales_and_offsets(blocks))


def _q5_k(blocks: Tensor) -> Groups:
    fifth = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1
    codes = _nibbles(blocks[:, 48:].reshape(-1, 32)).view(-1, 8, 32).bitwise_or_(fifth << 4)
    return Groups(codes, *_scales_and_offsets(blocks))


def _q6_k(blocks: Tensor) -> Groups:
    # two halves of 128 weights, each with 64 bytes of low four bits and 32 bytes of high two bits
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = _signed(low.bitwise_or_(high << 4).view(-1, 16, 16), 32)
    return Groups(codes, blocks[:, 192:208].view(torch.int8).float().unsqueeze(2) * _half(blocks, 208))


# bits of the codes, and the function
_UNPACK: dict[GGMLQuantizationType, tuple[int, Callable[[Tensor], Groups]]] = {
    Kind.Q4_0: (4, _q4_0),
    Kind.Q4_1: (4, _q4_1),
    Kind.Q5_0: (8, _q5_0),
    Kind.Q5_1: (8, _q5_1),
    Kind.Q8_0: (8, _q8_0),
    Kind.Q4_K: (4, _q4_k),
    Kind.Q5_K: (8, _q5_k),
    Kind.Q6_K: (8, _q6_k),
}
