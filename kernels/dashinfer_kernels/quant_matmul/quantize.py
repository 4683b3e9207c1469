"""Weights to few bits: rounding to the nearest code, with a search for the range that costs least.

No data is needed and none is looked at. A group's range is shrunk in steps, and the one with the smallest squared error kept:
outliers that are cut cost less than a coarser grid for all the others. Scales are rounded to float16 before codes are chosen,
so that layouts may keep them in 16 bits. Of unsigned codes a whole one stands for 0: an offset is that many scales, which
tensor cores multiply exactly, at about 2% more error than an offset of any value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES, QuantizedWeight

# Shares of a group's range that are tried.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
FLOAT8_MAX = 448.0
FLOAT8_STEPS = 16  # scales that are tried, from the one of the greatest weight to twice that
_FOUR_BITS = 2.0**20 + 1
# Elements that are rounded at a time: on a CPU as many as its caches hold several copies of.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**26
_TINY = 2.0**-14  # the smallest scale: float16 has full precision from here on


def quantize_int(weight: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool) -> QuantizedWeight:
    """Round to integer codes.

    Args:
        weight: [out_features, in_features], any float type.
        bits: 4 or 8.
        group_size: inputs that share a scale, a divisor of in_features; None: a whole row.
        symmetric: signed codes without offsets, rather than unsigned codes with them.
    """
    rows, columns = weight.shape
    size = group_size or columns
    assert columns % size == 0
    shape, device = (rows, columns // size), weight.device
    codes = torch.empty(rows, columns, dtype=torch.int8 if symmetric else torch.uint8, device=device)
    scales = torch.empty(shape, device=device)
    offsets = None if symmetric else torch.empty(shape, device=device)
    for part in _chunks(weight):
        found = _round_groups(weight[part].reshape(-1, size).T.float().contiguous(), bits, symmetric)
        codes[part].view(-1, size).copy_(found[0].T)
        scales[part].view(-1).copy_(found[1])
        if offsets is not None:
            offsets[part].view(-1).copy_(found[2])
    return QuantizedWeight(codes=codes, scales=scales, offsets=offsets, bits=bits, group_size=size)


def quantize_float8(weight: Tensor) -> QuantizedWeight:
    """Round to E4M3 with a scale an output.

    The format is as precise at any magnitude, so nothing is clipped; but its steps are twice as far apart from each power of
    two on, and where those fall among an output's weights is worth a search through an octave of scales. Scales are bfloat16
    numbers, which layouts keep as they are.

    Args:
        weight: [out_features, in_features], any float type.
    """
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=FLOAT8, device=weight.device)
    scales = torch.empty(rows, 1, device=weight.device)
    for part in _chunks(weight):
        wide = weight[part].float()
        scales[part] = _float8_scales(wide)
        codes[part] = (wide / scales[part]).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return QuantizedWeight(codes=codes, scales=scales, group_size=columns)


def _float8_scales(weight: Tensor) -> Tensor:
    """[rows, columns] float32 to the scales [rows, 1] with which E4M3 comes nearest."""
    peaks = weight.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
    exact, spare, error = (torch.empty_like(weight) for _ in range(3))
    best, least = torch.empty_like(peaks), torch.full_like(peaks, torch.inf)
    for step in range(1, FLOAT8_STEPS + 1):
        scales = (peaks * (2 ** (step / FLOAT8_STEPS) / FLOAT8_MAX)).bfloat16().float()
        torch.div(weight, scales, out=exact)
        # c x - (c x - x) is what four significant bits leave of x; subnormal numbers, which have fewer, count little
        torch.mul(exact, _FOUR_BITS, out=spare)
        torch.sub(spare, exact, out=error)
        exact.sub_(spare.sub_(error))
        cost = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).mul_(scales)
        best = torch.where(cost < least, scales, best)
        least = torch.minimum(cost, least)
    return best


def _chunks(weight: Tensor) -> Iterator[slice]:
    """Rows that are rounded at a time."""
    rows, columns = weight.shape
    step = max((CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK) // columns, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _round_groups(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [size, groups], in float32, scales [groups] and offsets [groups] of groups [size, groups] float32.

    A group is a column: reductions and products with a value a group then run along the memory.
    """
    least, most = RANGES[bits] if symmetric else (0, 2**bits - 1)
    low, high = groups.amin(0).clamp_(max=0), groups.amax(0).clamp_(min=0)
    peaks = torch.maximum(high, -low)
    exact, codes = torch.empty_like(groups), torch.empty_like(groups)

    def in_codes(scales: Tensor, offsets: Tensor) -> None:
        """Sets `exact` to the groups in units of their codes, and `codes` to what they are rounded to."""
        torch.sub(groups, offsets, out=exact)
        torch.round(exact.div_(scales), out=codes).clamp_(least, most)

    best: tuple[Tensor, Tensor, Tensor] | None = None
    for clip in CLIPS:
        if symmetric:
            offsets, scales = torch.zeros_like(peaks), _half(peaks * (clip / most))
        else:
            scales = _half((high - low) * (clip / most))
            offsets = (low * clip / scales).round_().clamp_(-most, 0).mul_(scales)
        in_codes(scales, offsets)
        error = exact.sub_(codes).square_().sum(0).mul_(scales.square())
        if best is None:
            best = error, scales, offsets
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scales, offsets), best, strict=True))
    assert best is not None
    _, scales, offsets = best
    in_codes(scales, offsets)
    return codes, scales, offsets


def _half(scales: Tensor) -> Tensor:
    return _nearest_half(scales.clamp_(min=_TINY))


def _nearest_half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).half().float()
