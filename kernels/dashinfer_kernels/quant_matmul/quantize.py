"""Weights to few bits: rounding to the nearest code, with a search for the range that costs least.

No data is needed and none is looked at. A group's range is shrunk in steps, and the one with the smallest squared error kept:
outliers that are cut cost less than a coarser grid for all the others. Scales are rounded to float16 before codes are chosen,
so that layouts may keep them in 16 bits.
"""

import torch
from torch import Tensor

from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES, QuantizedWeight

# Shares of a group's range that are tried.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
FLOAT8_MAX = 448.0
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
    groups = weight.float().view(rows, columns // size, size)
    choose = _signed if symmetric else _unsigned
    best, codes, scales, offsets = None, None, None, None
    for clip in CLIPS:
        found = choose(groups, bits, clip)
        values = found[0].float() * found[1] + (0.0 if found[2] is None else found[2])
        error = (values - groups).square_().sum(-1, keepdim=True)
        if best is None:
            best, (codes, scales, offsets) = error, found
            continue
        better = error < best
        best = torch.where(better, error, best)
        codes = torch.where(better, found[0], codes)
        scales = torch.where(better, found[1], scales)
        if offsets is not None:
            offsets = torch.where(better, found[2], offsets)
    return QuantizedWeight(
        codes=codes.view(rows, columns),
        scales=scales.squeeze(-1).contiguous(),
        offsets=None if offsets is None else offsets.squeeze(-1).contiguous(),
        bits=bits,
        group_size=size,
    )


def quantize_float8(weight: Tensor) -> QuantizedWeight:
    """Round to E4M3 with a scale an output. The format keeps its precision over its range, so nothing is clipped.

    Args:
        weight: [out_features, in_features], any float type.
    """
    wide = weight.float()
    peaks = wide.abs().amax(-1, keepdim=True)
    scales = (peaks / FLOAT8_MAX).clamp_(min=_TINY / FLOAT8_MAX)
    codes = (wide / scales).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return QuantizedWeight(codes=codes, scales=scales, group_size=weight.shape[1])


def _signed(groups: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, None]:
    """Codes [rows, groups, size] and scales [rows, groups, 1] for a range cut to `clip` of it."""
    least, most = RANGES[bits]
    scales = _half(groups.abs().amax(-1, keepdim=True) * (clip / most))
    codes = (groups / scales).round_().clamp_(least, most)
    return codes.to(torch.int8), scales, None


def _unsigned(groups: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `_signed`, with offsets [rows, groups, 1]."""
    most = 2**bits - 1
    low, high = groups.aminmax(dim=-1, keepdim=True)
    offsets = _nearest_half(low * clip)
    scales = _half((high * clip - offsets) / most)
    codes = ((groups - offsets) / scales).round_().clamp_(0, most)
    return codes.to(torch.uint8), scales, offsets


def _half(scales: Tensor) -> Tensor:
    return _nearest_half(scales.clamp_(min=_TINY))


def _nearest_half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).half().float()
