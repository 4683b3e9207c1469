from typing import Any

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

        expected = reference.rotate(qkv.view(1, 3, 8)[:, :1], cos_sin[[position]])
        torch.testing.assert_close(q, expected)


def inputs(
    device: str, dtype: torch.dtype, cache_dtype: torch.dtype, sizes: tuple[int, int, int], tokens: int = 11
) -> tuple[dict[str, Any], list[Tensor]]:
    """Sizes as keywords; qkv, a poisoned cache and scales for it, and slots of which the last is padding."""
    num_heads, num_kv_heads, head_dim = sizes
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    cache = torch.full((NUM_BLOCKS, 2, num_kv_heads, BLOCK_SIZE, head_dim), 99.0).to(cache_dtype)
    scales = torch.full(cache.shape[:4], torch.nan)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:tokens]
    slots[-1] = -1
    keywords = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "eps": 1e-6}
    return keywords, [tensor.to(device) for tensor in (qkv, cache, scales, slots)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES[1:])
@pytest.mark.parametrize(
    ("sizes", "rotary_dim"),
    [((9, 3, 64), 64), ((5, 1, 80), 80), ((2, 2, 80), 32), ((3, 1, 96), 96), ((7, 2, 128), 128), ((2, 1, 256), 64)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_triton_matches_float64(
    triton_path: str, sizes: tuple[int, int, int], rotary_dim: int, normed: bool, dtype: torch.dtype, tolerance: float
) -> None:
    keywords, (qkv, cache, _, slots) = inputs(triton_path, dtype, dtype, sizes)
    positions, cos_sin = torch.randint(0, 64, (11,), device=triton_path), table(rotary_dim).to(triton_path)
    norms = [torch.randn(sizes[2]).to(dtype).to(triton_path) if normed else None for _ in range(2)]
    wide_qkv, wide = qkv.double(), cache.double()

    q = rope_kv_write(qkv, positions, cos_sin, cache, slots, **keywords, q_norm=norms[0], k_norm=norms[1])

    assert q.dtype == dtype
    wide_norms = [None if norm is None else norm.double() for norm in norms]
    expected = reference.rope_kv_write(
        wide_qkv, positions, cos_sin, wide, slots, **keywords, q_norm=wide_norms[0], k_norm=wide_norms[1]
    )
    for actual, right in zip([q, cache], [expected, wide], strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)


def skip_without_float8(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype.is_floating_point and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this GPU")


SECTIONS = [((16, 8, 8), False), ((12, 10, 10), True), ((11, 11, 10), True)]


@pytest.mark.parametrize(("section", "interleaved"), SECTIONS)
@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_multimodal_positions_turn_their_frequencies(
    path: str, section: tuple[int, int, int], interleaved: bool, head_dim: int, request: pytest.FixtureRequest
) -> None:
    """Each frequency turns as it would if its position were the only one."""
    device = request.getfixturevalue("triton_path") if path == "triton" else "cpu"
    keywords, (qkv, cache, _, slots) = inputs(device, torch.float32, torch.float32, (3, 1, head_dim))
    positions, cos_sin = torch.randint(0, 64, (3, 11), device=device), table(64).to(device)
    whole = qkv.clone()

    q = rope_kv_write(qkv, positions, cos_sin, cache, slots, **keywords, mrope_section=section, mrope_interleaved=interleaved)

    heads = whole.view(11, 5, head_dim)
    alone = [reference.rotate(heads[:, :4], cos_sin[axis]) for axis in positions]
    if interleaved:
        axes = [i % 3 if i < 3 * section[i % 3] else 0 for i in range(32)]
    else:
        axes = [0] * section[0] + [1] * section[1] + [2] * section[2]
    expected = torch.stack([alone[(axes * 2)[i] if i < 64 else 0][..., i] for i in range(head_dim)], -1)
    torch.testing.assert_close(q, expected[:, :3])
    where = (slots[:-1] // BLOCK_SIZE, slots[:-1] % BLOCK_SIZE)
    torch.testing.assert_close(cache[where[0], 0, 0, where[1]], expected[:-1, 3])
    assert torch.equal(cache[where[0], 1, 0, where[1]], heads[:-1, 4])


def test_three_equal_positions_are_one() -> None:
    keywords, (qkv, cache, _, slots) = inputs("cpu", torch.float32, torch.float32, (3, 1, 64))
    positions, other = torch.randint(0, 64, (11,)), cache.clone()

    q = rope_kv_write(qkv.clone(), positions, table(64), cache, slots, **keywords)
    same = rope_kv_write(
        qkv, positions.expand(3, -1), table(64), other, slots, **keywords, mrope_section=(12, 10, 10), mrope_interleaved=True
    )

    torch.testing.assert_close(same, q)
    torch.testing.assert_close(other, cache)


@pytest.mark.parametrize(("cache_dtype", "step"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
@pytest.mark.parametrize("path", ["cpu", "triton"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32)])
def test_a_quantised_cache_holds_what_an_unquantised_one_does(
    path: str, cache_dtype: torch.dtype, step: float, head_dim: int, rotary_dim: int, request: pytest.FixtureRequest
) -> None:
    """To half a step of the type: of the largest of the head for int8, of each value for float8."""
    device = request.getfixturevalue("triton_path") if path == "triton" else "cpu"
    skip_without_float8(device, cache_dtype)
    if path == "triton" and device == "cpu" and cache_dtype.is_floating_point:
        pytest.skip("Triton's interpreter rounds to float8 wrongly")
    keywords, (qkv, cache, scales, slots) = inputs(device, torch.float32, cache_dtype, (4, 2, head_dim))
    qkv[0] = 0
    positions, cos_sin = torch.randint(0, 64, (11,), device=device), table(rotary_dim).to(device)
    norms = {"q_norm": torch.randn(head_dim, device=device), "k_norm": torch.randn(head_dim, device=device)}
    exact, untouched = torch.zeros(cache.shape, device=device), cache.clone()
    reference.rope_kv_write(qkv.clone(), positions, cos_sin, exact, slots, **keywords, **norms)

    rope_kv_write(qkv, positions, cos_sin, cache, slots, **keywords, **norms, kv_scales=scales)

    touched = ~scales.isnan()
    blocks, offsets = slots[:-1] // BLOCK_SIZE, slots[:-1] % BLOCK_SIZE
    assert touched.sum() == 10 * 2 * 2
    assert touched[blocks, :, :, offsets].all()
    assert torch.equal(cache.float()[~touched], untouched.float()[~touched])
    value, right = (cache.float() * scales.unsqueeze(-1))[touched], exact[touched]
    largest = right.abs().amax(-1, keepdim=True)
    allowed = step * (right.abs() if cache_dtype.is_floating_point else largest) + 2**-9 / 448 * largest
    assert ((value - right).abs() <= allowed * 1.001).all()
    torch.testing.assert_close(value.abs().amax(-1, keepdim=True), largest)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
def test_triton_quantises_as_defined(triton_path: str, cache_dtype: torch.dtype) -> None:
    """Bit for bit where nothing is rotated: ties for int8, what float8 can hold for the interpreter's sake."""
    skip_without_float8(triton_path, cache_dtype)
    keywords, (qkv, cache, scales, slots) = inputs(triton_path, torch.float32, cache_dtype, (1, 1, 64))
    qkv[:, :] = torch.arange(-96, 96) / 2
    qkv[:, ::64] = 127 if cache_dtype == torch.int8 else 448  # the scale is 1
    if cache_dtype.is_floating_point:
        qkv = qkv.to(cache_dtype).float()
    cos_sin, positions = table(64).to(triton_path), torch.zeros(11, dtype=torch.int64, device=triton_path)
    other, other_scales = cache.clone(), scales.clone()
    reference.rope_kv_write(qkv.clone(), positions, cos_sin, other, slots, **keywords, kv_scales=other_scales)

    rope_kv_write(qkv, positions, cos_sin, cache, slots, **keywords, kv_scales=scales)

    assert torch.equal(cache.view(torch.uint8), other.view(torch.uint8))
    torch.testing.assert_close(scales, other_scales, equal_nan=True)


@pytest.mark.parametrize("path", ["cpu", "triton"])
def test_padding_is_not_written(path: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_path") if path == "triton" else "cpu"
    keywords, (qkv, _, _, _) = inputs(device, torch.float32, torch.float32, (2, 1, 8), tokens=3)
    cache = torch.full((NUM_BLOCKS, 2, 1, BLOCK_SIZE, 8), torch.nan, device=device)
    slots, positions = torch.tensor([-1, 37, -1], device=device), torch.arange(3, device=device)

    q = rope_kv_write(qkv, positions, table(8).to(device), cache, slots, **keywords)

    assert q.isfinite().all()
    for half in cache.unbind(1):
        assert (~half.isnan().all(-1).view(-1)).nonzero().flatten().tolist() == [37]


def test_triton_takes_no_tokens(triton_path: str) -> None:
    empty = torch.empty(0, dtype=torch.int64, device=triton_path)
    cache = torch.zeros(1, 2, 1, BLOCK_SIZE, 8, device=triton_path)

    q = rope_kv_write(
        torch.empty(0, 24, device=triton_path), empty, table(8).to(triton_path), cache, empty,
        num_heads=1, num_kv_heads=1, head_dim=8,
    )  # fmt: skip

    assert q.shape == (0, 1, 8)


def test_triton_results_do_not_depend_on_the_batch(triton_path: str) -> None:
    keywords, (qkv, cache, _, slots) = inputs(triton_path, torch.float32, torch.float32, (5, 1, 64))
    norms = {"q_norm": torch.randn(64, device=triton_path), "k_norm": torch.randn(64, device=triton_path)}
    positions, cos_sin = torch.randint(0, 64, (11,), device=triton_path), table(64).to(triton_path)
    kept, alone = qkv.clone(), cache.clone()

    together = rope_kv_write(qkv, positions, cos_sin, cache, slots, **keywords, **norms)

    for token in range(11):
        one = slice(token, token + 1)
        q = rope_kv_write(kept[one], positions[one], cos_sin, alone, slots[one], **keywords, **norms)
        assert torch.equal(q, together[one])
    assert torch.equal(alone, cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_addresses_pass_32_bits() -> None:
    num_blocks = 2**31 // (2 * BLOCK_SIZE * 128) + 2
    if torch.cuda.mem_get_info()[0] < 2 * num_blocks * 2 * BLOCK_SIZE * 128 + 2**30:
        pytest.skip("needs 6 GB of GPU memory")
    cache = torch.zeros(num_blocks, 2, 1, BLOCK_SIZE, 128, dtype=torch.bfloat16, device="cuda")
    qkv, slots = torch.randn(1, 384).bfloat16().cuda(), torch.tensor([num_blocks * BLOCK_SIZE - 1], device="cuda")
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 128}

    rope_kv_write(qkv.clone(), torch.zeros_like(slots), table(128).cuda(), cache, slots, **sizes)

    assert torch.equal(cache[-1, :, 0, -1].flatten(), qkv[0, 128:])
