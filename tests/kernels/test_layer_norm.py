import pytest
import torch

from dashinfer_kernels import add_layer_norm, layer_norm
from dashinfer_kernels.layer_norm import reference

TOLERANCES = [(torch.float32, 2e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("path", ["cpu", "triton_path"])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (5, 37), (3, 576), (2, 4097)])
def test_layer_norm_matches_float64(
    shape: tuple[int, int], path: str, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    device = "cpu" if path == "cpu" else request.getfixturevalue(path)
    x, weight, bias = (part.to(dtype).to(device) for part in (5 * torch.randn(shape) + 3, *torch.randn(2, shape[1])))

    actual = layer_norm(x, weight, bias, 1e-5)

    assert actual.dtype == dtype
    expected = reference.layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("path", ["cpu", "triton_path"])
@pytest.mark.parametrize("shape", [(1, 1280), (7, 96)])
def test_add_layer_norm_adds_in_place_and_norms_the_sum(
    shape: tuple[int, int], path: str, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    device = "cpu" if path == "cpu" else request.getfixturevalue(path)
    x, residual = torch.randn(shape).to(dtype).to(device), torch.randn(shape).to(device)
    weight, bias = torch.randn(2, shape[1]).to(device)
    total = residual + x

    normed = add_layer_norm(x, residual, weight, bias, 1e-5)

    assert normed.dtype == dtype
    assert torch.equal(residual, total)
    expected = reference.layer_norm(total.double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_reference_of_layer_norm_is_the_formula() -> None:
    x, two = torch.tensor([[1.0, 5.0]], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)

    expected = torch.tensor([[-4.0, 4.0]], dtype=torch.float64) / (4 + 0.5) ** 0.5 + 2
    torch.testing.assert_close(reference.layer_norm(x, two, two, 0.5), expected)


@pytest.mark.parametrize("path", ["cpu", "triton_path"])
def test_layer_norm_of_a_great_mean_loses_nothing(path: str, request: pytest.FixtureRequest) -> None:
    device = "cpu" if path == "cpu" else request.getfixturevalue(path)
    x = torch.randn(3, 100, device=device).add_(1000)
    one, zero = torch.ones(100, device=device), torch.zeros(100, device=device)

    expected = reference.layer_norm(x.double(), one.double(), zero.double(), 1e-6)
    torch.testing.assert_close(layer_norm(x, one, zero, 1e-6).double(), expected, rtol=1e-3, atol=2e-4)


def test_triton_layer_norm_of_rows_apart_to_a_narrower_type_leaves_the_rest(triton_path: str) -> None:
    wide, (weight, bias) = torch.full((3, 80), torch.nan, device=triton_path), torch.randn(2, 37, device=triton_path)
    x = wide[:, :37].normal_()

    actual = layer_norm(x, weight, bias, 1e-5, torch.float16)

    torch.testing.assert_close(actual, reference.layer_norm(x, weight, bias, 1e-5, torch.float16), rtol=2e-3, atol=2e-3)
    assert wide[:, 37:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_layer_norm_addresses_pass_32_bits() -> None:
    tokens, hidden = 2**31 // 8192 + 3, 8192
    if torch.cuda.mem_get_info()[0] < 3 * 2 * tokens * hidden:
        pytest.skip("needs 13 GB of GPU memory")
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    weight, bias = torch.randn(2, hidden).bfloat16().cuda()
    x[-1] = torch.randn(hidden)

    actual = layer_norm(x, weight, bias, 1e-5)[-1]

    expected = reference.layer_norm(x[-1].double(), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)
