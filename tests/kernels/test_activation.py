from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import gelu_mul, silu_mul
from dashinfer_kernels.activation import reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("op", "definition"), [(silu_mul, reference.silu_mul), (gelu_mul, reference.gelu_mul)])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 74), (33, 3072)])
def test_matches_float64(
    op: Callable[[Tensor], Tensor],
    definition: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    gate_up = (3 * torch.randn(shape)).to(dtype)
    kept = gate_up.clone()

    actual = op(gate_up)

    assert actual.dtype == dtype
    assert actual.shape == (shape[0], shape[1] // 2)
    assert torch.equal(gate_up, kept)
    torch.testing.assert_close(actual.double(), definition(gate_up.double()), rtol=tolerance, atol=tolerance)


def test_the_gate_is_the_first_half() -> None:
    gate_up = torch.tensor([[0.0, 5.0]])

    assert silu_mul(gate_up).item() == 0
    assert gelu_mul(gate_up).item() == 0
