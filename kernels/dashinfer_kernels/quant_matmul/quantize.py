"""Weights to few bits: rounding to the nearest code, with a search for the range that costs least.

No data is needed and none is looked at. A group's range is shrunk in steps, and the one with the smallest squared error kept:
outliers that are cut cost less than a coarser grid for all the others. Unsigned codes then have their scales (and offsets)
fitted to the weights by least squares, and are chosen again. Scales are rounded to float16 before codes are chosen, so that
layouts may keep them in 16 bits.

Offsets of unsigned codes are of one of two kinds. Any: a float16 number. Whole: of the codes a whole one stands for 0, and an
offset is that many scales, which tensor cores multiply exactly and which takes 8 bits. In groups of 32 the squared error of any
ones is 0.88 of that of whole ones, in groups of 128 0.96, with weights as a normal distribution has them. It is nothing with
weights that lie on a grid with offsets already, as those of a file of few bits do once it was converted to 16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES, QuantizedWeight

# Shares of a group's range that are tried.
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
CLIPS_BEFORE_FITS = (1.0, 0.92, 0.84, 0.76)  # of groups with any offset, which fits bring closer
FITS = 2  # of scales and offsets to codes
SAMPLED_ROWS = 64  # of a matrix, that are rounded with both kinds of offsets
FEWER_ERRORS = 0.5  # of squared errors: below it any offset is worth the time that it costs on a GPU
FLOAT8_MAX = 448.0
FLOAT8_STEPS = 16  # scales that are tried, from the one of the greatest weight to twice that
_FOUR_BITS = 2.0**20 + 1
# Elements that are rounded at a time: on a CPU as many as its caches hold several copies of.
CPU_CHUNK, GPU_CHUNK = 2**18, 2**26
_Best = tuple[Tensor, Tensor, Tensor]  # squared errors, scales and offsets, [groups] each
_TINY = 2.0**-14  # the smallest scale: float16 has full precision from here on


def quantize_int(
    weight: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool, whole_zeros: bool | None = None
) -> QuantizedWeight:
    """Round to integer codes.

    Args:
        weight: [out_features, in_features], any float type.
        bits: 4 or 8.
        group_size: inputs that share a scale, a divisor of in_features; None: a whole row.
        symmetric: signed codes without offsets, rather than unsigned codes with them.
        whole_zeros: whether offsets are whole numbers of scales; None: with 8 bits, whose steps are finer than float16 offsets;
            with 4 not on a CPU, whose layouts keep any offset at the same cost, nor where any halve the squared error.
    """
    rows, columns = weight.shape
    size = group_size or columns
    assert columns % size == 0
    shape, device = (rows, columns // size), weight.device
    codes = torch.empty(rows, columns, dtype=torch.int8 if symmetric else torch.uint8, device=device)
    scales = torch.empty(shape, device=device)
    offsets = None if symmetric else torch.empty(shape, device=device)
    if whole_zeros is None:
        whole_zeros = bits == 8 or (not symmetric and device.type != "cpu" and not _gains_by_any_offset(weight, size, bits))
    for part in _chunks(weight):
        found = _round_groups(_as_columns(weight[part], size), bits, symmetric, whole_zeros)
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


def _as_columns(weight: Tensor, size: int) -> Tensor:
    """[rows, columns] to [size, groups] float32."""
    return weight.reshape(-1, size).T.float().contiguous()


def _gains_by_any_offset(weight: Tensor, size: int, bits: int) -> bool:
    """Whether any offsets leave less than `FEWER_ERRORS` of what whole ones do, in some rows."""
    groups = _as_columns(weight[:: -(-len(weight) // SAMPLED_ROWS)], size)
    any_, whole = (_squared_error(groups, _round_groups(groups, bits, False, kind)) for kind in (False, True))
    return bool(any_ < FEWER_ERRORS * whole)


def _squared_error(groups: Tensor, rounded: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    codes, scales, offsets = rounded
    return (codes * scales + offsets - groups).square().sum()


def _round_groups(groups: Tensor, bits: int, symmetric: bool, whole_zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [size, groups], in float32, scales [groups] and offsets [groups] of groups [size, groups] float32.

    A group is a column: reductions and products with a value a group then run along the memory.
    """
    least, most = RANGES[bits] if symmetric else (0, 2**bits - 1)
    low, high = groups.amin(0), groups.amax(0)
    if symmetric or whole_zeros:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    exact, codes = torch.empty_like(groups), torch.empty_like(groups)

    def choose_codes(scales: Tensor, offsets: Tensor) -> None:
        """Sets `exact` to the groups in units of their codes, and `codes` to what they are rounded to."""
        torch.sub(groups, offsets, out=exact)
        torch.round(exact.div_(scales), out=codes).clamp_(least, most)

    def better(found: _Best | None, scales: Tensor, offsets: Tensor) -> _Best:
        """`codes` are chosen, and the better ones kept of these scales and offsets and of those found before."""
        choose_codes(scales, offsets)
        error = _sum(exact.sub_(codes).square_()).mul_(scales.square())
        if found is None:
            return error, scales, offsets
        less = error < found[0]
        return tuple(torch.where(less, new, old) for new, old in zip((error, scales, offsets), found, strict=True))

    best: _Best | None = None
    for clip in CLIPS if symmetric or whole_zeros else CLIPS_BEFORE_FITS:
        if symmetric:
            scales = _half(torch.maximum(high, -low) * (clip / most))
            offsets = torch.zeros_like(scales)
        else:
            scales = _half((high - low) * (clip / most))
            if whole_zeros:
                offsets = (low * clip / scales).round_().clamp_(-most, 0).mul_(scales)
            else:
                offsets = _nearest_half(low + (high - low) * ((1 - clip) / 2))
        best = better(best, scales, offsets)
    assert best is not None
    if not symmetric:
        choose_codes(*best[1:])
        fit = _fit_scales if whole_zeros else _fit
        for _ in range(FITS):
            best = better(best, *fit(groups, codes, best[1], best[2], exact))
    _, scales, offsets = best
    choose_codes(scales, offsets)
    return codes, scales, offsets


def _fit(groups: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and offsets with which codes come nearest to groups; the given scales where all codes of a group are one.

    Args:
        spare: like `codes`, overwritten.
    """
    count = len(groups)
    mean, code = _sum(spare.copy_(groups)) / count, _sum(spare.copy_(codes)) / count
    squares = _sum(torch.mul(codes, codes, out=spare)) / count - code.square()
    products = _sum(torch.mul(codes, groups, out=spare)) / count - code * mean
    scales = _half(torch.where(squares > 0, products / squares, scales))
    return scales, _nearest_half(mean - scales * code)


def _fit_scales(groups: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """As `_fit`, with the same codes standing for 0."""
    zeros = (-offsets / scales).round_()
    squares = _sum(torch.sub(codes, zeros, out=spare).square_())
    products = _sum(torch.sub(codes, zeros, out=spare).mul_(groups))
    scales = _half(torch.where(squares > 0, products / squares, scales))
    return scales, -zeros * scales


def _sum(columns: Tensor) -> Tensor:
    """Over the first dimension, in an order that does not depend on the number of columns; they are overwritten."""
    while len(columns) > 1:
        half = len(columns) // 2
        columns[:half] += columns[-half:]
        columns = columns[: len(columns) - half]
    return columns[0].clone()


def _half(scales: Tensor) -> Tensor:
    return _nearest_half(scales.clamp_(min=_TINY))


def _nearest_half(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).half().float()
