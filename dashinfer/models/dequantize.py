"""GGUF's block formats as float32: torch versions of the common ones, `gguf.quants` for the rest.

A format cuts a row into blocks of 32 or 256 weights with scales of their own. The functions here take blocks as
[blocks, bytes of a block] uint8 and give [blocks, weights of a block] float32, with the very bits that `gguf.quants` gives;
they are several times as fast, and loading a model from a .gguf file takes about as long as they do. The byte layouts are those
of ggml-common.h in ggml.
"""

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from torch import Tensor

from dashinfer.errors import UnsupportedModel

Kind = GGMLQuantizationType
_PLAIN = {Kind.F64: torch.float64, Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


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
    if (unpack := _UNPACK.get(kind)) is not None:
        return unpack(data.view(-1, GGML_QUANT_SIZES[kind][1])).view(rows, -1)
    try:
        return torch.from_numpy(gguf_dequantize(data.numpy(), kind)).view(rows, -1)
    except NotImplementedError:
        raise UnsupportedModel(f"GGUF tensors of the type {kind.name} are not supported") from None


def _half(blocks: Tensor, start: int) -> Tensor:
    """[blocks, 1] float32: the half-precision number at byte `start` of each block."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """[n, m] uint8 -> [n, 2, m]: the low four bits of each byte, then the high ones."""
    return torch.stack((codes & 15, codes >> 4), dim=1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """[blocks, 32] uint8: bit i of the 32-bit number at byte `start`, as 0 or 16."""
    bits = blocks[:, start : start + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return ((bits & 1) << 4).view(-1, 32)


def _q4_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 2:]).view(-1, 32).float()
    return codes.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 4:]).view(-1, 32).float()
    return codes.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:]).view(-1, 32).bitwise_or_(_fifth_bits(blocks, 2)).float()
    return codes.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:]).view(-1, 32).bitwise_or_(_fifth_bits(blocks, 4)).float()
    return codes.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: [blocks, 8, 1] float32 each. Bytes 4 to 16 pack eight scales and eight minima of six bits."""
    packed = blocks[:, 4:16]
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((scales & 63, (rest & 15) | ((scales >> 2) & 48)), dim=1)
    minima = torch.cat((minima & 63, (rest >> 4) | ((minima >> 2) & 48)), dim=1)
    return (scales * _half(blocks, 0)).unsqueeze(2), (minima * _half(blocks, 2)).unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 8, 32).float()
    return codes.mul_(scales).sub_(minima).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(blocks)
    fifth = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1
    codes = _nibbles(blocks[:, 48:].reshape(-1, 32)).view(-1, 8, 32).bitwise_or_(fifth << 4).float()
    return codes.mul_(scales).sub_(minima).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    # two halves of 128 weights, each with 64 bytes of low four bits and 32 bytes of high two bits
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = low.bitwise_or_(high << 4).view(-1, 16, 16).float()
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return codes.sub_(32).mul_(scales.unsqueeze(2)).view(-1, 256)


_UNPACK: dict[GGMLQuantizationType, Callable[[Tensor], Tensor]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
