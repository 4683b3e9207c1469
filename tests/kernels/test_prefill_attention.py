"""The prefill kernel against attention's float64 definition. Every cache is NaN except where a sequence has a token."""

import dataclasses

import numpy as np
import pytest
import torch
from test_attention import make
from torch import Tensor

from dashinfer_kernels import PagedBatch, dispatch, paged_attention
from dashinfer_kernels.attention import prefill, reference
from dashinfer_kernels.attention.prefill import PrefillConfig, Shape

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SCALE = 0.125

# (start, length) of each sequence: a whole prompt, a chunk after a prefix, a single token
SEQUENCES = [(0, 21), (62, 13), (5, 1)]
POINTERS = PrefillConfig(block_m=32, block_n=32, num_warps=4, num_stages=2)
DESCRIPTOR = dataclasses.replace(POINTERS, block_n=16, use_descriptor=True)


def on(device: str, q: Tensor, cache: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor, PagedBatch]:
    layout = (batch.host_starts, batch.host_lengths, batch.host_tables)
    return q.to(device), cache.to(device), PagedBatch.build(*layout, block_size=batch.block_size, device=device)


def attend(
    q: Tensor, cache: Tensor, batch: PagedBatch, config: PrefillConfig, *, first: int = 0, **options: float | Tensor | None
) -> Tensor:
    """Of the sequences from `first` on; NaN where nothing was written."""
    out = torch.full((q.shape[0], q.shape[1] * q.shape[2]), torch.nan, dtype=q.dtype, device=q.device)
    prefill.paged_attention(q, cache, batch, out, scale=SCALE, first_sequence=first, config=config, **options)
    return out


def expect(q: Tensor, cache: Tensor, batch: PagedBatch, *, window: int | None = None, softcap: float | None = None) -> Tensor:
    return reference.paged_attention(q.double(), cache.double(), batch, scale=SCALE, window=window, softcap=softcap)


def check(
    q: Tensor,
    cache: Tensor,
    batch: PagedBatch,
    config: PrefillConfig,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    actual = attend(q, cache, batch, config, window=window, softcap=softcap)
    expected = expect(q, cache, batch, window=window, softcap=softcap)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTOR])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (25, None), (None, 3.0), (25, 3.0)])
def test_options(triton_path: str, config: PrefillConfig, window: int | None, softcap: float | None) -> None:
    check(*on(triton_path, *make(SEQUENCES, heads=(6, 2))), config, window=window, softcap=softcap)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "config"),
    [
        ((2, 2), 80, 8, POINTERS),
        ((7, 1), 96, 64, DESCRIPTOR),
        ((2, 1), 128, 32, dataclasses.replace(DESCRIPTOR, block_n=32)),
        ((3, 1), 256, 16, DESCRIPTOR),
        ((20, 1), 64, 16, dataclasses.replace(POINTERS, block_m=16)),  # more heads a KV head than rows a tile
        ((8, 2), 64, 128, POINTERS),
    ],
)
def test_head_counts_and_sizes(
    triton_path: str, heads: tuple[int, int], head_dim: int, block_size: int, config: PrefillConfig
) -> None:
    tensors = make([(40, 9)], heads=heads, head_dim=head_dim, block_size=block_size)

    check(*on(triton_path, *tensors), config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTOR])
def test_half_precision(triton_path: str, config: PrefillConfig, dtype: torch.dtype) -> None:
    if triton_path == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly")

    check(*on(triton_path, *make(SEQUENCES, heads=(6, 2), dtype=dtype)), config)


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTOR])
def test_quantized_cache(triton_path: str, config: PrefillConfig, stored: torch.dtype) -> None:
    if triton_path == "cuda" and stored == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU that knows float8")
    q, cache, batch = make([(0, 20), (50, 11)], heads=(6, 2))
    integers = cache.nan_to_num(0).mul(30).round().clamp(-127, 127)
    values = integers.to(stored) if stored == torch.int8 else cache.to(stored)
    scales = torch.rand(cache.shape[:4]) / 30
    scales[cache[..., 0].isnan()] = torch.nan
    wide = values.double() * scales.unsqueeze(-1)
    q, values, batch = on(triton_path, q, values, batch)

    actual = attend(q, values, batch, config, kv_scales=scales.to(triton_path), window=40)

    torch.testing.assert_close(
        actual.double(), expect(q, wide.to(triton_path), batch, window=40), rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype]
    )


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTOR])
def test_blocks_before_the_window_are_not_read(triton_path: str, config: PrefillConfig) -> None:
    """They may belong to somebody else by now, also where they share a tile of keys with the window."""
    q, cache, batch = on(triton_path, *make([(106, 15), (66, 20)], heads=(2, 1)))
    clean = attend(q, cache, batch, config, window=20)
    for row, oldest in enumerate((87, 47)):
        cache[batch.block_tables[row, : oldest // 16].long()] = torch.nan

    assert torch.equal(attend(q, cache, batch, config, window=20), clean)


@pytest.mark.parametrize("window", [None, 30])
def test_a_row_is_the_same_bits_in_any_chunk_and_batch(triton_path: str, window: int | None) -> None:
    q, cache, batch = on(triton_path, *make([(0, 40), (20, 9)], heads=(3, 1)))
    whole = attend(q, cache, batch, POINTERS, window=window)

    for start, length in [(0, 17), (17, 1), (18, 22)]:
        chunk = PagedBatch.build([start], [length], batch.host_tables[:1], block_size=16, device=triton_path)
        out = attend(q[start : start + length], cache, chunk, POINTERS, window=window)
        assert torch.equal(out, whole[start : start + length])


def test_sequences_before_the_first_are_left_alone(triton_path: str) -> None:
    q, cache, batch = on(triton_path, *make([(9, 1), (30, 1), (3, 12)], heads=(2, 1)))

    out = attend(q, cache, batch, POINTERS, first=2)

    assert out[:2].isnan().all()
    torch.testing.assert_close(out[2:].double(), expect(q, cache, batch)[2:], rtol=1e-5, atol=1e-5)


def test_queries_with_gaps_between_tokens(triton_path: str) -> None:
    q, cache, batch = on(triton_path, *make([(7, 20)], heads=(6, 2)))

    check(torch.cat((q, q), 1)[:, :6], cache, batch, POINTERS)


@pytest.mark.parametrize("block_size", [16, 64])
def test_public_function(triton_path: str, block_size: int) -> None:
    tensors = make([(9, 1), (0, 30), (40, 5)], heads=(6, 2), block_size=block_size, dtype=torch.float16)
    q, cache, batch = on(triton_path, *tensors)

    actual = paged_attention(q, cache, batch, scale=SCALE)

    torch.testing.assert_close(actual.double(), expect(q, cache, batch), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("head_dim", "quantized"), [(100, False), (72, True)])
def test_head_sizes_that_no_descriptor_takes(triton_path: str, head_dim: int, quantized: bool) -> None:
    q, cache, batch = make([(0, 30), (40, 5)], heads=(2, 1), head_dim=head_dim, block_size=64, dtype=torch.float16)
    scales = torch.ones(cache.shape[:4], device=triton_path) if quantized else None
    if quantized:
        cache = cache.nan_to_num(0).mul(20).round().to(torch.int8)
    q, cache, batch = on(triton_path, q, cache, batch)

    actual = paged_attention(q, cache, batch, scale=SCALE / 20, kv_scales=scales)

    expected = reference.paged_attention(q.double(), cache.double(), batch, scale=SCALE / 20, window=None, softcap=None)
    tolerance = 2e-3 * (20 if quantized else 1)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", [1, 3, 40])
def test_tiles_cover_every_row_once_and_the_longest_come_first(group: int) -> None:
    _, _, batch = make([(3, 1), (0, 70), (900, 33), (5, 2)], heads=(2, 1))

    tiles = prefill._tiles(batch, 1, group, 32).numpy()

    expected = [(s, n) for s, length in [(1, 70), (2, 33), (3, 2)] for n in range(-(-length * group // 32))]
    assert sorted(map(tuple, tiles.tolist())) == expected
    last = np.minimum(((tiles[:, 1] + 1) * 32 - 1) // group, batch.host_lengths[tiles[:, 0]] - 1)
    assert (np.diff(batch.host_starts[tiles[:, 0]] + last) <= 0).all()


def test_deterministic_mode_ignores_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [Shape(128, 64, quantized=False, wide=False, windowed=False, short=short) for short in (False, True)]
    assert len({prefill.choose_config(shape, "hopper") for shape in shapes}) == 2

    monkeypatch.setattr(dispatch, "deterministic", True)

    assert len({prefill.choose_config(shape, "hopper") for shape in shapes}) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTOR])
def test_addresses_beyond_two_to_the_31(config: PrefillConfig) -> None:
    blocks = 2**31 // (2 * 2 * 16 * 128) + 8
    if torch.cuda.mem_get_info()[0] < 3 * blocks * 2 * 2 * 16 * 128:
        pytest.skip("needs about 7 GB of GPU memory")
    cache = torch.empty(blocks, 2, 2, 16, 128, dtype=torch.bfloat16, device="cuda")
    cache[-8:].normal_()
    table = list(range(blocks - 8, blocks))
    batch = PagedBatch.build([60], [65], [table], block_size=16, device="cuda")
    near = PagedBatch.build([60], [65], [range(8)], block_size=16, device="cuda")
    q = torch.randn(65, 4, 128, dtype=torch.bfloat16, device="cuda")

    assert torch.equal(attend(q, cache, batch, config), attend(q, cache[-8:].clone(), near, config))


def test_in_deterministic_mode_a_token_alone_is_the_token_of_a_chunk(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise: prompts end in chunks of one token, and answers are computed again after a preemption."""
    monkeypatch.setattr(dispatch, "deterministic", True)
    q, cache = torch.randn(40, 6, 64, device=triton_path), torch.randn(6, 2, 3, 16, 64, device=triton_path)
    table = [[4, 0, 5]]

    def attend(start: int, length: int) -> Tensor:
        batch = PagedBatch.build([start], [length], table, block_size=16, device=triton_path)
        return paged_attention(q[start : start + length], cache, batch, scale=0.125)

    whole = attend(0, 40)

    for start, length in [(0, 1), (17, 1), (39, 1), (31, 2), (5, 30)]:
        assert torch.equal(attend(start, length), whole[start : start + length])
