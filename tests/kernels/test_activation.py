from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import gelu_mul, silu_mul
from dashinfer_kernels.activation import reference

# exp(-gate) is infinite for a gate far below zero, and 1 / (1 + infinity) is the 0 that it should be.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("op", "definition"), [(silu_mul, reference.silu_mul), (gelu_mul, reference.gelu_mul)])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (7, 74), (3, 6000)])
def test_triton_matches_float64(
    triton_path: str,
    op: Callable[[Tensor], Tensor],
    definition: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    gate_up = (3 * torch.randn(shape)).to(dtype).to(triton_path)
    kept = gate_up.clone()

    actual = op(gate_up)

    assert actual.dtype == dtype
    assert actual.shape == (shape[0], shape[1] // 2)
    assert torch.equal(gate_up, kept)
    torch.testing.assert_close(actual.double(), definition(gate_up.double()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
def test_triton_is_finite_at_both_ends(triton_path: str, op: Callable[[Tensor], Tensor]) -> None:
    gate_up = torch.tensor([[-3e4, 3e4, 2.0, 2.0]], device=triton_path)

    assert op(gate_up).tolist() == [[0.0, 6e4]]


def test_triton_writes_every_element_and_no_other(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the first rows of poisoned memory."""
    memory = torch.full((5, 37), torch.nan, device=triton_path)
    monkeypatch.setattr(torch, "empty", lambda tokens, _, **__: memory[:tokens])

    silu_mul(torch.randn(3, 74, device=triton_path))

    assert memory[:3].isfinite().all()
    assert memory[3:].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_addresses_pass_32_bits() -> None:
    tokens, intermediate = 2**31 // 16384 + 3, 8192
    if torch.cuda.mem_get_info()[0] < 2 * 3 * tokens * intermediate:
        pytest.skip("needs 7 GB of GPU memory")
    gate_up = torch.zeros(tokens, 2 * intermediate, dtype=torch.bfloat16, device="cuda")
    gate_up[-1] = torch.randn(2 * intermediate)

    actual = silu_mul(gate_up)[-1]

    torch.testing.assert_close(actual.double(), reference.silu_mul(gate_up[-1].double()), rtol=1e-2, atol=1e-2)
