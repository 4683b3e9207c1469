"""Activations to 8 bits, alone and at the end of the ops that make them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import add_rms_norm, gelu_mul, quantize_rows, rms_norm, silu_mul
from dashinfer_kernels.quant_matmul import reference
from dashinfer_kernels.quant_matmul.reference import ACTIVATION_TYPES, Activations
from dashinfer_kernels.quantized_rows import QuantizedRows

KINDS: tuple[Activations, ...] = ("int8", "fp8")


def check(actual: QuantizedRows, x: Tensor, activations: Activations, slack: float = 0.0) -> None:
    """Scales are those of the definition, and each value one of those that are next to the exact one.

    Args:
        x: [rows, columns], what was to be quantised.
        slack: relative error of what was quantised instead.
    """
    dtype, greatest = ACTIVATION_TYPES[activations]
    scales = reference.quantize_rows(x, activations)[1].double()
    exact = x.double() / scales[:, None]

    assert (actual.values.shape, actual.values.dtype, actual.scales.dtype) == (x.shape, dtype, torch.float32)
    torch.testing.assert_close(actual.scales.double(), scales, rtol=1e-6 + slack, atol=0)
    values = actual.values.double()
    error = (values - exact).abs()
    half_step = torch.tensor(0.5) if activations == "int8" else (exact.abs() * 2.0**-4).clamp(min=2.0**-10)
    allowed = half_step * 1.001 + (slack * exact).abs()
    assert (error <= allowed).all()
    assert values.abs().amax(-1).eq(torch.where(x.abs().amax(-1) > 0, greatest, 0.0)).all()


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (5, 37), (3, 576), (2, 4097)])
@pytest.mark.parametrize("triton", [False, True])
def test_rows(
    request: pytest.FixtureRequest, shape: tuple[int, int], dtype: torch.dtype, activations: Activations, triton: bool
) -> None:
    device = request.getfixturevalue("triton_path") if triton else "cpu"
    x = (5 * torch.randn(shape)).to(dtype).to(device)

    check(quantize_rows(x, activations), x, activations)


@pytest.mark.parametrize("activations", KINDS)
def test_rows_of_zeros_of_next_to_nothing_and_of_great_numbers(triton_path: str, activations: Activations) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1e-38, 0.0, -1e-38], [3e38, -1.0, 1e30]], device=triton_path)

    actual = quantize_rows(x, activations)

    assert actual.values[:2].float().eq(0).all()
    assert actual.scales[0] == 1
    assert actual.scales.isfinite().all() and actual.scales.gt(0).all()
    assert actual.values[2].tolist() == [ACTIVATION_TYPES[activations][1], 0, 0]
    values, scales = reference.quantize_rows(x, activations)
    assert torch.equal(actual.values.float(), values.float())
    torch.testing.assert_close(actual.scales, scales)


def test_ties_are_rounded_to_even(triton_path: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], device=triton_path)

    assert quantize_rows(x, "int8").values.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


def test_rows_may_lie_apart(triton_path: str) -> None:
    wide = torch.full((3, 80), torch.nan, device=triton_path)
    x = wide[:, :37].normal_()

    check(quantize_rows(x, "int8"), x, "int8")


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize(("shape", "dtype"), [((1, 3584), torch.float16), ((7, 96), torch.float32), ((4, 576), torch.float16)])
@pytest.mark.parametrize("triton", [False, True])
def test_norms(
    request: pytest.FixtureRequest, shape: tuple[int, int], dtype: torch.dtype, activations: Activations, triton: bool
) -> None:
    device = request.getfixturevalue("triton_path") if triton else "cpu"
    x, residual, weight = (torch.randn(size, device=device) for size in (shape, shape, shape[1:]))
    x = x.to(dtype)
    total = residual + x

    added = add_rms_norm(x, residual, weight, 1e-5, quantize=activations)

    slack = 1e-3 if dtype == torch.float16 else 1e-5
    assert torch.equal(residual, total)
    expected = rms_norm(total, weight, 1e-5)
    check(added, expected, activations, slack)
    check(rms_norm(total, weight, 1e-5, dtype, quantize=activations), expected, activations, slack)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (7, 74), (3, 6000), (2, 4096)])
@pytest.mark.parametrize("triton", [False, True])
def test_gated_activations(
    request: pytest.FixtureRequest,
    op: Callable[..., Tensor | QuantizedRows],
    shape: tuple[int, int],
    activations: Activations,
    triton: bool,
) -> None:
    device = request.getfixturevalue("triton_path") if triton else "cpu"
    gate_up = (3 * torch.randn(shape)).half().to(device)

    check(op(gate_up, quantize=activations), op(gate_up), activations, 1e-3)


def test_every_element_and_no_other_is_written(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the first rows of poisoned memory."""
    memory = {torch.int8: torch.full((9, 37), 99, dtype=torch.int8), torch.float32: torch.full((9,), torch.nan)}
    memory = {dtype: each.to(triton_path) for dtype, each in memory.items()}
    x, gate_up = torch.rand(7, 37, device=triton_path), torch.rand(7, 74, device=triton_path)
    weight = torch.ones(37, device=triton_path)
    monkeypatch.setattr(torch, "empty", lambda shape, *, dtype, **_: memory[dtype][: shape[0]])

    for op in (
        lambda: quantize_rows(-x, "int8"),
        lambda: rms_norm(-x, weight, 1e-5, quantize="int8"),
        lambda: silu_mul(gate_up * torch.where(torch.arange(74, device=triton_path) < 37, -1, 1), quantize="int8"),
    ):
        memory[torch.int8].fill_(99)
        memory[torch.float32].fill_(torch.nan)
        op()

        assert memory[torch.int8][:7].le(0).all() and memory[torch.int8][7:].eq(99).all()
        assert memory[torch.float32][:7].isfinite().all() and memory[torch.float32][7:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_addresses_pass_32_bits() -> None:
    rows, columns = 2**31 // 16384 + 3, 16384
    if torch.cuda.mem_get_info()[0] < 4 * rows * columns:
        pytest.skip("needs 9 GB of GPU memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(columns)

    actual = quantize_rows(x, "int8")

    check(QuantizedRows(actual.values[-1:], actual.scales[-1:]), x[-1:], "int8")
