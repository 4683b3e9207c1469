"""Integers of a few bits out of the 32-bit words that files pack them into."""

import torch
from torch import Tensor

# Where AWQ's words keep outputs 0 to 7.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Each row's integers, one a byte: lowest bits first, from one word on into the next.

    Args:
        words: [rows, columns] int32, with `count * bits` bits or more in a row.
        bits: 2, 3, 4 or 8.

    Returns:
        [rows, count] uint8.
    """
    # all machines that this runs on put the lowest byte first; strides of a single column may be anything
    stream = words.contiguous().view(-1).view(torch.uint8).view(len(words), -1)
    if bits == 8:
        return stream[:, :count].contiguous()
    if bits == 3:  # eight in three bytes
        stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 3))
        low, middle, high = stream.view(len(words), -1, 3).int().unbind(-1)
        joined = low | (middle << 8) | (high << 16)
        codes = torch.stack([((joined >> shift) & 7).to(torch.uint8) for shift in range(0, 24, 3)], -1)
    else:
        codes = torch.stack([(stream >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1)
    return codes.view(len(words), -1)[:, :count].contiguous()


def unpack_awq(words: Tensor) -> Tensor:
    """Outputs as AutoAWQ's GEMM layout packs them: [rows, outputs / 8] int32 -> [outputs, rows] uint8, of 4 bits."""
    columns = words.T.contiguous()
    codes = torch.empty((len(columns), 8, columns.shape[1]), dtype=torch.uint8, device=words.device)
    for output, place in enumerate(_AWQ_PLACES):
        codes[:, output] = (columns >> 4 * place) & 15
    return codes.view(-1, columns.shape[1])


def unpack_zeros(words: Tensor, bits: int, count: int, *, ones: int | None, misplaced: bool = False) -> Tensor:
    """GPTQ's zero points, [rows, count] uint8.

    Args:
        words: [rows, columns] int32, packed as `unpack` says.
        ones: the bits of the integers that 1 was taken from after packing (version 1 of the format): those of most layers, even
            where this layer's are others. What was borrowed from the next one is given back; of 3 bits none ever borrow. None:
            nothing was taken.
        misplaced: of 3 bits, by gptqmodel before 7.0, which took the 1s from the wrong bits: the first word's and the third's
            are those of one another.
    """
    if ones is None:
        return unpack(words, bits, count)
    if bits == ones == 3 and not misplaced:
        return (unpack(words, bits, count) + 1) & 7
    taken = sum(1 << place for place in range(0, 96, ones))
    pattern = [(taken >> shift) & 0xFFFFFFFF for shift in ((64, 32, 0) if ones == 3 and misplaced else (0, 32, 64))]
    added = torch.tensor(pattern, device=words.device).repeat(-(-words.shape[1] // 3))[: words.shape[1]]
    wrapped = (words.long() + added) & 0xFFFFFFFF
    return unpack(torch.where(wrapped < 1 << 31, wrapped, wrapped - (1 << 32)).int(), bits, count)
