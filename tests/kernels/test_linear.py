import pytest
import torch

from dashinfer_kernels import pack_linear
from dashinfer_kernels.linear import reference


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize(("out_features", "in_features"), [(5, 7), (64, 64), (129, 96), (960, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_matches_float64_at_any_number_of_rows(
    out_features: int, in_features: int, biased: bool, dtype: torch.dtype, tolerance: float
) -> None:
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if biased else None
    layer = pack_linear(weight.clone(), bias)

    for rows in (0, 1, 3, 17, 130):
        x = torch.randn(rows, in_features).to(dtype)
        actual = layer(x)

        assert actual.shape == (rows, out_features)
        assert actual.dtype == dtype
        expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_takes_rows_that_are_not_contiguous() -> None:
    weight, x = torch.randn(8, 6), torch.randn(4, 12)[:, ::2]

    torch.testing.assert_close(pack_linear(weight)(x), x @ weight.T)


def test_takes_a_weight_that_is_a_view() -> None:
    whole, x = torch.randn(20, 6), torch.randn(3, 6)

    torch.testing.assert_close(pack_linear(whole[::2])(x), x @ whole[::2].T)


def test_knows_its_sizes() -> None:
    layer = pack_linear(torch.zeros(8, 6), torch.zeros(8))

    assert (layer.out_features, layer.in_features, layer.nbytes) == (8, 6, 4 * (8 * 6 + 8))


def test_keeps_no_reference_to_the_weight_it_packed() -> None:
    weight = torch.randn(8, 6)
    expected = torch.ones(1, 6) @ weight.T
    layer = pack_linear(weight)
    weight.zero_()

    torch.testing.assert_close(layer(torch.ones(1, 6)), expected)
