import pytest
import torch

from dashinfer_kernels import dispatch, rotate_heads
from dashinfer_kernels.rotate import reference

PATHS = ["cpu", "triton_path"]


def angles(tokens: int, head_dim: int) -> torch.Tensor:
    turns = 7 * torch.randn(tokens, head_dim // 2)
    return torch.cat((turns.cos(), turns.sin()), 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(0, 2, 8), (1, 1, 2), (37, 3, 72), (5, 16, 80)])
def test_matches_float64_and_leaves_the_other_heads(
    tokens: int, heads: int, head_dim: int, path: str, dtype: torch.dtype, tolerance: float, request: pytest.FixtureRequest
) -> None:
    device = "cpu" if path == "cpu" else request.getfixturevalue(path)
    fused = torch.randn(tokens, heads + 2, head_dim).to(dtype).to(device)
    before, turns = fused.clone(), angles(tokens, head_dim).to(device)

    rotate_heads(fused[:, :heads], turns)

    expected = before.double()
    reference.rotate_heads(expected[:, :heads], turns)
    torch.testing.assert_close(fused.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(fused[:, heads:], before[:, heads:])


def test_the_reference_turns_halves_against_each_other() -> None:
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64)

    reference.rotate_heads(heads, torch.tensor([[0.0, 1.0, 1.0, 0.0]]))

    assert heads.flatten().tolist() == [-3.0, 2.0, 1.0, 4.0]


@pytest.mark.parametrize("path", PATHS)
def test_a_tokens_bits_do_not_depend_on_the_others(
    path: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "cpu" if path == "cpu" else request.getfixturevalue(path)
    monkeypatch.setattr(dispatch, "deterministic", True)
    heads, turns = torch.randn(9, 3, 20, device=device), angles(9, 20).to(device)
    together = heads.clone()
    rotate_heads(together, turns)

    for token in range(9):
        alone = heads[token : token + 1].clone()
        rotate_heads(alone, turns[token : token + 1])
        assert torch.equal(alone[0], together[token])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_addresses_pass_32_bits() -> None:
    tokens, width = 70400, 32768
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of GPU memory")
    storage = torch.empty(tokens, width, dtype=torch.bfloat16, device="cuda")
    heads, turns = storage[:, :160].unflatten(1, (2, 80)), angles(tokens, 80).cuda()
    heads.copy_(torch.randn(tokens, 2, 80))
    expected = heads[-3:].double()
    reference.rotate_heads(expected, turns[-3:])

    rotate_heads(heads, turns)

    torch.testing.assert_close(heads[-3:].double(), expected, rtol=2e-2, atol=2e-2)
