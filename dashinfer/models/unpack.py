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
    stream = words.contiguous().view(torch.uint8)  # all machines that this runs on put the lowest byte first
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
    """As AutoAWQ's GEMM layout packs outputs: [rows, outputs / 8] int32 -> [rows, outputs] uint8, of 4 bits."""
    stored = unpack(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return stored[:, :, _AWQ_PLACES].reshape(len(words), -1)


def unpack_zeros(words: Tensor, bits: int, count: int, *, less_one: bool, misplaced: bool = False) -> Tensor:
    """GPTQ's zero points, [rows, count] uint8.

    Args:
        words: [rows, columns] int32, packed as `unpack` says.
        less_one: 1 was taken from each after packing (version 1 of the format): what was borrowed from the next one is given
            back. Of 3 bits they never borrow.
        misplaced: of 3 bits, by gptqmodel before 7.0, which took the 1s from the wrong bits: the first word's and the third's
            are those of one another.
    """
    if not less_one:
        return unpack(words, bits, count)
    if bits == 3 and not misplaced:
        return (unpack(words, bits, count) + 1) & 7
    ones = sum(1 << place for place in range(0, 96, bits))
    pattern = [(ones >> shift) & 0xFFFFFFFF for shift in ((64, 32, 0) if bits == 3 else (0, 32, 64))]
    added = torch.tensor(pattern, device=words.device).repeat(-(-words.shape[1] // 3))[: words.shape[1]]
    wrapped = (words.long() + added) & 0xFFFFFFFF
    return unpack(torch.where(wrapped < 1 << 31, wrapped, wrapped - (1 << 32)).int(), bits, count)
