from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import QuantizedWeight, quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul import quantize

# Bits, group size, symmetric, whole zeros.
FORMS = [
    (4, 32, False, None),
    (4, 32, False, True),
    (4, 96, False, False),
    (4, 64, True, None),
    (8, None, True, None),
    (8, 16, False, None),
    (8, 96, True, None),
]
PARAMETERS = ("bits", "group_size", "symmetric", "whole_zeros")


def squared_errors(weight: Tensor, values: Tensor, size: int) -> Tensor:
    """[outputs, groups]."""
    return (weight.double() - values.double()).square().view(len(weight), -1, size).sum(-1)


@pytest.mark.parametrize(PARAMETERS, FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_group_is_worse_than_without_clipping(
    bits: int, group_size: int | None, symmetric: bool, whole_zeros: bool | None, dtype: torch.dtype
) -> None:
    weight = (torch.randn(40, 192) * 0.05).to(dtype)
    weight[:, ::50] *= 8
    size = group_size or 192

    rounded = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric, whole_zeros=whole_zeros)

    groups = weight.double().view(40, -1, size)
    most = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = groups.abs().amax(-1, keepdim=True) / most if symmetric else (high - low) / most
    zeros = torch.zeros(()) if symmetric else (-low / scales).round()
    values = ((groups / scales + zeros).round().clamp(-most, most) - zeros) * scales
    found = squared_errors(weight, rounded.dequantize(), size)
    plain = squared_errors(weight, values.view(40, 192), size)
    # Scales and offsets are rounded to float16, which counts where steps are fine.
    assert (found <= 1.5 * plain + 1e-12).all()
    assert found.sum() < 1.01 * plain.sum()
    assert (rounded.bits, rounded.group_size) == (bits, size)


def test_clipping_pays_where_groups_have_outliers() -> None:
    weight = torch.randn(64, 512)
    weight[:, ::128] *= 2

    rounded = quantize_int(weight, bits=4, group_size=128, symmetric=False)

    low, high = weight.view(64, 4, 128).aminmax(dim=-1)
    assert (rounded.scales * 15 < 0.97 * (high - low)).float().mean() > 0.5


@pytest.mark.parametrize(PARAMETERS, FORMS)
def test_the_same_in_any_chunks(
    bits: int, group_size: int | None, symmetric: bool, whole_zeros: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(101, 384)
    whole = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric, whole_zeros=whole_zeros)

    for rows in (1, 3, 64):
        monkeypatch.setattr(quantize, "CPU_CHUNK", rows * 384)
        parts = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric, whole_zeros=whole_zeros)
        assert torch.equal(parts.codes, whole.codes)
        assert torch.equal(parts.scales, whole.scales)
        assert symmetric or torch.equal(parts.offsets, whole.offsets)


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_one_value_are_kept(symmetric: bool) -> None:
    weight = torch.tensor([0.0, 0.5, -3.0]).repeat_interleave(32).repeat(2, 1)

    rounded = quantize_int(weight, bits=8, group_size=32, symmetric=symmetric)

    torch.testing.assert_close(rounded.dequantize(), weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(PARAMETERS, FORMS)
def test_scales_and_any_offsets_are_float16_numbers_and_whole_zeros_codes(
    bits: int, group_size: int | None, symmetric: bool, whole_zeros: bool | None
) -> None:
    weight = torch.randn(8, 192) * 1e-2 + 0.01

    rounded = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric, whole_zeros=whole_zeros)

    assert torch.equal(rounded.scales.half().float(), rounded.scales)
    if rounded.offsets is not None:
        zeros = (-rounded.offsets / rounded.scales).round()
        if whole_zeros or bits == 8:
            assert ((zeros >= 0) & (zeros < 2**bits)).all()
            torch.testing.assert_close(-zeros * rounded.scales, rounded.offsets)
        else:
            assert torch.equal(rounded.offsets.half().float(), rounded.offsets)


def grid_weights(rows: int, columns: int, size: int) -> Tensor:
    """[rows, columns] on a grid of 16 values a group, none of them 0, as a file of 4 bits is once converted."""
    codes = torch.randint(0, 16, (rows, columns // size, size))
    codes[..., 0], codes[..., 1] = 0, 15
    steps = 0.02 + 0.02 * torch.rand(rows, columns // size, 1)
    return (steps * (codes - 7.5)).view(rows, columns).bfloat16()


def test_weights_on_a_grid_with_offsets_keep_it() -> None:
    weight = grid_weights(64, 256, 32)

    found = quantize_int(weight, bits=4, group_size=32, symmetric=False)

    errors = squared_errors(weight, found.dequantize(), 32)
    whole = quantize_int(weight, bits=4, group_size=32, symmetric=False, whole_zeros=True)
    assert errors.mean() < 0.01 * squared_errors(weight, whole.dequantize(), 32).mean()


@pytest.mark.parametrize(("size", "share"), [(32, 0.91), (128, 0.98)])
def test_any_offsets_leave_less(size: int, share: float) -> None:
    weight = torch.randn(256, 512)

    any_, whole = (
        quantize_int(weight, bits=4, group_size=size, symmetric=False, whole_zeros=kind).dequantize() for kind in (False, True)
    )

    assert (weight - any_).square().sum() < share * (weight - whole).square().sum()


def test_where_offsets_cost_time_they_are_any_for_a_grid_alone() -> None:
    assert quantize._gains_by_any_offset(grid_weights(300, 256, 32), 32, 4)
    assert not quantize._gains_by_any_offset(grid_weights(300, 256, 32), 128, 4)
    assert not quantize._gains_by_any_offset(torch.randn(300, 256), 32, 4)


@pytest.mark.parametrize("value", [0.0, 0.3, -3.0])
def test_any_offset_keeps_groups_of_one_value(value: float) -> None:
    weight = torch.full((2, 64), value).bfloat16()

    rounded = quantize_int(weight, bits=4, group_size=32, symmetric=False, whole_zeros=False)

    assert torch.equal(rounded.dequantize(torch.bfloat16), weight)


def test_float8_is_the_nearest_of_the_format() -> None:
    weight = torch.randn(16, 64)

    rounded = quantize_float8(weight)

    scaled = weight / rounded.scales
    step = torch.exp2(scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert ((rounded.codes.float() - scaled).abs() <= step / 2).all()


def test_float8_scales_are_searched_for() -> None:
    weight = torch.randn(32, 256)
    # Half of the outputs have their weights halfway between two codes where steps are the coarsest, if the greatest is 448.
    weight[1::2] = 448 * torch.exp2(-torch.randint(1, 6, (16, 256)).float()) * (8.5 / 7)
    weight[1::2, 0] = 448

    rounded = quantize_float8(weight)

    def error(scales: Tensor) -> Tensor:
        return ((weight / scales).to(torch.float8_e4m3fn).float() * scales - weight).norm(dim=-1)

    plain = weight.abs().amax(-1, keepdim=True) / 448
    found = error(rounded.scales)
    for share in (1.0, 1.2, 1.4, 1.6, 1.8):
        assert (found <= 1.05 * error(plain * share))[::2].all()
    assert (found < 0.5 * error(plain))[1::2].all()
    assert torch.equal(rounded.scales.bfloat16().float(), rounded.scales)
    assert (weight.abs() <= 448 * rounded.scales).all()


@pytest.mark.parametrize("round_", [quantize_float8, partial(quantize_int, bits=4, group_size=32, symmetric=False)])
def test_narrow_types_in_parts_give_the_same(
    round_: Callable[[Tensor], QuantizedWeight], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(20, 64).bfloat16()
    expected = round_(weight.float())
    monkeypatch.setattr(quantize, "CPU_CHUNK", 3 * 64)

    actual = round_(weight)

    assert torch.equal(actual.codes.float(), expected.codes.float())
    assert torch.equal(actual.scales, expected.scales)
