from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import QuantizedWeight, quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul import quantize

FORMS = [(4, 32, False), (4, 64, True), (8, None, True), (8, 16, False), (8, 96, True)]


def squared_errors(weight: Tensor, values: Tensor, size: int) -> Tensor:
    """[outputs, groups]."""
    return (weight.double() - values.double()).square().view(len(weight), -1, size).sum(-1)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_group_is_worse_than_without_clipping(
    bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = (torch.randn(40, 192) * 0.05).to(dtype)
    weight[:, ::50] *= 8
    size = group_size or 192

    rounded = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric)

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


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMS)
def test_the_same_in_any_chunks(bits: int, group_size: int | None, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(101, 384)
    whole = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric)

    for rows in (1, 3, 64):
        monkeypatch.setattr(quantize, "CPU_CHUNK", rows * 384)
        parts = quantize_int(weight, bits=bits, group_size=group_size, symmetric=symmetric)
        assert torch.equal(parts.codes, whole.codes)
        assert torch.equal(parts.scales, whole.scales)
        assert symmetric or torch.equal(parts.offsets, whole.offsets)


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_one_value_are_kept(symmetric: bool) -> None:
    weight = torch.tensor([0.0, 0.5, -3.0]).repeat_interleave(32).repeat(2, 1)

    rounded = quantize_int(weight, bits=8, group_size=32, symmetric=symmetric)

    torch.testing.assert_close(rounded.dequantize(), weight, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMS)
def test_scales_are_float16_numbers_and_zero_is_a_code(bits: int, group_size: int | None, symmetric: bool) -> None:
    rounded = quantize_int(torch.randn(8, 192) * 1e-2 + 0.01, bits=bits, group_size=group_size, symmetric=symmetric)

    assert torch.equal(rounded.scales.half().float(), rounded.scales)
    if rounded.offsets is not None:
        zeros = (-rounded.offsets / rounded.scales).round()
        assert ((zeros >= 0) & (zeros < 2**bits)).all()
        torch.testing.assert_close(-zeros * rounded.scales, rounded.offsets)


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
