import pytest
import torch

from dashinfer_kernels import add_rms_norm, rms_norm
from dashinfer_kernels.norm import reference

TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 576), (3, 37), (105, 576)])
def test_rms_norm_matches_float64(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    x, weight = (5 * torch.randn(shape)).to(dtype), torch.randn(shape[1]).to(dtype)

    actual = rms_norm(x, weight, 1e-5)

    assert actual.dtype == dtype
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_reference_is_the_formula() -> None:
    x, weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)

    expected = torch.tensor([[3.0, 8.0]], dtype=torch.float64) / (12.5 + 0.5) ** 0.5
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.5), expected)


def test_eps_keeps_a_row_of_zeros_finite() -> None:
    assert rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).eq(0).all()


def test_float16_squares_do_not_overflow() -> None:
    x = torch.full((1, 64), 3000.0, dtype=torch.float16)

    torch.testing.assert_close(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones_like(x))


def test_the_result_may_be_narrower_than_the_input() -> None:
    x, weight = torch.randn(3, 37), torch.randn(37)

    torch.testing.assert_close(rms_norm(x, weight, 1e-5, torch.bfloat16), rms_norm(x, weight, 1e-5).bfloat16())


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_add_rms_norm_adds_in_place_and_norms_the_sum(dtype: torch.dtype, tolerance: float) -> None:
    x, residual, weight = torch.randn(7, 96).to(dtype), torch.randn(7, 96), torch.randn(96)
    total = residual + x

    normed = add_rms_norm(x, residual, weight, 1e-5)

    assert normed.dtype == dtype
    assert torch.equal(residual, total)
    expected = reference.rms_norm(total.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)


def test_small_additions_to_a_large_residual_are_not_lost() -> None:
    residual, small = torch.full((1, 8), 256.0), torch.full((1, 8), 0.25, dtype=torch.bfloat16)
    for _ in range(16):
        add_rms_norm(small, residual, torch.ones(8), 1e-5)

    assert residual.eq(260).all()
