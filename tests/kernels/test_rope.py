import pytest
import torch
from torch import Tensor

from dashinfer_kernels import rope_kv_write
from dashinfer_kernels.rope import reference

TOLERANCES = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
NUM_BLOCKS, BLOCK_SIZE = 9, 16


def table(rotary_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    angles = torch.arange(64, dtype=torch.float64).unsqueeze(1) * 100.0 ** (
        -torch.arange(0, 1, 2 / rotary_dim, dtype=torch.float64)
    )
    return torch.cat((angles.cos(), angles.sin()), -1)[:, :rotary_dim].to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (96, 96), (128, 64), (256, 256)])
@pytest.mark.parametrize("normed", [False, True])
def test_matches_float64(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, normed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    tokens = 11
    sizes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "eps": 1e-6}
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    positions, slots = torch.randint(0, 64, (tokens,)), torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:tokens]
    norms = [torch.randn(head_dim).to(dtype) if normed else None for _ in range(2)]
    cache = torch.randn(NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, head_dim).to(dtype)
    wide_qkv, wide = qkv.clone().double(), cache.clone().double()
    cos_sin = table(rotary_dim)

    q = rope_kv_write(qkv, positions, cos_sin, cache, slots, **sizes, q_norm=norms[0], k_norm=norms[1])

    assert q.shape == (tokens, num_heads, head_dim)
    assert q.dtype == dtype
    wide_norms = [None if norm is None else norm.double() for norm in norms]
    expected = reference.rope_kv_write(
        wide_qkv, positions, cos_sin, wide, slots, **sizes, q_norm=wide_norms[0], k_norm=wide_norms[1]
    )
    for actual, right in zip([q, cache], [expected, wide], strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)


def test_untouched_slots_stay_as_they_were() -> None:
    cache = torch.full((NUM_BLOCKS, 2, 1, BLOCK_SIZE, 8), torch.nan)
    slots = torch.tensor([3, 2 * BLOCK_SIZE + 5])

    rope_kv_write(torch.randn(2, 24), torch.tensor([0, 1]), table(8), cache, slots, num_heads=1, num_kv_heads=1, head_dim=8)

    for half in cache.unbind(1):
        written = ~half.isnan().all(-1).view(-1)
        assert written.nonzero().flatten().tolist() == slots.tolist()


def test_position_zero_is_not_rotated() -> None:
    qkv = torch.randn(1, 24)
    cache = torch.zeros(1, 2, 1, BLOCK_SIZE, 8)

    q = rope_kv_write(
        qkv.clone(), torch.tensor([0]), table(8), cache, torch.tensor([4]), num_heads=1, num_kv_heads=1, head_dim=8
    )

    assert torch.equal(q.flatten(), qkv[0, :8])
    assert torch.equal(cache[0, 0, 0, 4], qkv[0, 8:16])
    assert torch.equal(cache[0, 1, 0, 4], qkv[0, 16:])


def test_a_quarter_turn_swaps_the_halves() -> None:
    quarter = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    cache = torch.zeros(1, 2, 1, BLOCK_SIZE, 4)

    q = rope_kv_write(
        torch.tensor([[1.0, 2.0, 3.0, 4.0] * 3]), torch.tensor([0]), quarter, cache, torch.tensor([0]),
        num_heads=1, num_kv_heads=1, head_dim=4,
    )  # fmt: skip

    assert q.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_no_tokens() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    cache = torch.zeros(1, 2, 1, BLOCK_SIZE, 8)

    q = rope_kv_write(torch.empty(0, 24), empty, table(8), cache, empty, num_heads=1, num_kv_heads=1, head_dim=8)

    assert q.shape == (0, 1, 8)


def test_steps_do_not_mix() -> None:
    """Layers of a step share what was derived from its tensors; the next step, and another table, do not."""
    qkv, slots = torch.randn(1, 24), torch.tensor([4])
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    for position, cos_sin in [(3, table(8)), (3, table(8)), (7, table(8)), (7, table(4))]:
        cache = torch.zeros(1, 2, 1, BLOCK_SIZE, 8)
        q = rope_kv_write(qkv.clone(), torch.tensor([position]), cos_sin, cache, slots, **sizes)

        expected = reference.rotate(qkv.view(1, 3, 8)[:, :1], torch.tensor([position]), cos_sin)
        torch.testing.assert_close(q, expected)
