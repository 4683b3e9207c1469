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


def test_the_norm_of_a_wide_sum_has_the_type_asked_for() -> None:
    x, residual, weight = torch.randn(7, 96), torch.randn(7, 96), torch.randn(96)
    total = residual + x

    normed = add_rms_norm(x, residual, weight, 1e-5, torch.bfloat16)

    assert torch.equal(residual, total)
    assert torch.equal(normed, reference.rms_norm(total, weight, 1e-5, torch.bfloat16))


def test_small_additions_to_a_large_residual_are_not_lost() -> None:
    residual, small = torch.full((1, 8), 256.0), torch.full((1, 8), 0.25, dtype=torch.bfloat16)
    for _ in range(16):
        add_rms_norm(small, residual, torch.ones(8), 1e-5)

    assert residual.eq(260).all()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (5, 37), (3, 576), (2, 4097)])
def test_triton_rms_norm_matches_float64(
    triton_path: str, shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    x, weight = (5 * torch.randn(shape)).to(dtype).to(triton_path), torch.randn(shape[1]).to(dtype).to(triton_path)

    actual = rms_norm(x, weight, 1e-5)

    assert actual.dtype == dtype
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 3584), (7, 96), (4, 576)])
def test_triton_add_rms_norm_matches_float64(
    triton_path: str, shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    x, residual = torch.randn(shape).to(dtype).to(triton_path), torch.randn(shape).to(triton_path)
    weight, total = torch.randn(shape[1]).to(triton_path), residual + x

    normed = add_rms_norm(x, residual, weight, 1e-5)

    assert normed.dtype == dtype
    assert torch.equal(residual, total)
    expected = reference.rms_norm(total.double(), weight.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)


def test_triton_rows_may_lie_apart_and_the_result_be_narrower(triton_path: str) -> None:
    wide, weight = torch.full((3, 80), torch.nan, device=triton_path), torch.randn(37, device=triton_path)
    x = wide[:, :37].normal_()

    actual = rms_norm(x, weight, 1e-5, torch.float16)

    torch.testing.assert_close(actual, reference.rms_norm(x, weight, 1e-5, torch.float16), rtol=2e-3, atol=2e-3)


def test_triton_writes_every_element_and_no_other(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the first rows of poisoned memory."""
    memory = torch.full((9, 37), torch.nan, device=triton_path)
    monkeypatch.setattr(torch, "empty", lambda shape, **_: memory[: shape[0]])
    x, weight = torch.randn(7, 37, device=triton_path), torch.randn(37, device=triton_path)

    rms_norm(x, weight, 1e-5)

    assert memory[:7].isfinite().all()
    assert memory[7:].isnan().all()


def test_triton_results_do_not_depend_on_the_batch(triton_path: str) -> None:
    x, weight = torch.randn(9, 576, device=triton_path), torch.randn(576, device=triton_path)

    together = rms_norm(x, weight, 1e-5)

    for row in range(9):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5), together[row : row + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_addresses_pass_32_bits() -> None:
    tokens, hidden = 2**31 // 16384 + 3, 16384
    if torch.cuda.mem_get_info()[0] < 3 * 2 * tokens * hidden:
        pytest.skip("needs 13 GB of GPU memory")
    x, weight = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda"), torch.ones(hidden, dtype=torch.bfloat16)
    x[-1] = torch.randn(hidden)

    actual = rms_norm(x, weight.cuda(), 1e-5)[-1]

    expected = reference.rms_norm(x[-1].double(), weight.cuda().double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)
