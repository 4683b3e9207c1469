"""Attention against its float64 definition. Every cache is NaN except where a sequence has a token."""

import math

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import PagedBatch, dispatch, paged_attention
from dashinfer_kernels.attention import cpu_plan, reference
from dashinfer_kernels.attention.cpu_rows import CacheRows
from dashinfer_kernels.rope.reference import quantise as quantise_rows

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# (start, length) of each sequence
DECODE_ONE = [(10, 1)]
DECODE_LONG = [(700, 1)]
DECODE_FIRST = [(0, 1), (0, 1)]
DECODE_EVEN = [(40, 1), (33, 1), (47, 1), (16, 1), (15, 1)]
DECODE_UNEVEN = [(40, 1), (1800, 1), (3, 1), (1500, 1), (64, 1)]
PREFILL = [(0, 37)]
CHUNK = [(50, 30)]
TILED = [(20, 700)]
MIXED = [(9, 1), (100, 1), (0, 70), (33, 300), (5, 1), (0, 1)]
SHAPES = [DECODE_ONE, DECODE_LONG, DECODE_FIRST, DECODE_EVEN, DECODE_UNEVEN, PREFILL, CHUNK, TILED, MIXED]


def make(
    sequences: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (9, 3),
    head_dim: int = 64,
    block_size: int = 16,
) -> tuple[Tensor, Tensor, PagedBatch]:
    """Queries, cache and batch of sequences over scattered blocks."""
    pages = [-(-(start + length) // block_size) for start, length in sequences]
    free = torch.randperm(sum(pages) + 5).tolist()
    tables = [[free.pop() for _ in range(count)] for count in pages]
    starts, lengths = [start for start, _ in sequences], [length for _, length in sequences]
    cache = torch.full((sum(pages) + 5, 2, heads[1], block_size, head_dim), torch.nan, dtype=dtype)
    for (start, length), table in zip(sequences, tables, strict=True):
        for page, block in enumerate(table):
            tokens = min(block_size, start + length - page * block_size)
            cache[block, :, :, :tokens] = torch.randn(2, heads[1], tokens, head_dim).to(dtype)
    batch = PagedBatch.build(starts, lengths, tables, block_size=block_size, device="cpu")
    return torch.randn(sum(lengths), heads[0], head_dim).to(dtype), cache, batch


def check(q: Tensor, cache: Tensor, batch: PagedBatch, *, window: int | None = None, softcap: float | None = None) -> None:
    scale = q.shape[2] ** -0.5
    actual = paged_attention(q, cache, batch, scale=scale, window=window, softcap=softcap)
    assert actual.dtype == q.dtype
    assert actual.shape == (q.shape[0], q.shape[1] * q.shape[2])
    expected = reference.paged_attention(q.double(), cache.double(), batch, scale=scale, window=window, softcap=softcap)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("sequences", SHAPES)
def test_matches_float64(
    sequences: list[tuple[int, int]], dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    check(*make(sequences, dtype=dtype), window=window, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(6, 3), (4, 4), (5, 1)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_head_counts_and_sizes(heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    check(*make([(70, 1), (3, 1), (0, 20), (20, 20)], dtype=dtype, heads=heads, head_dim=head_dim, block_size=block_size))


QUANTISED = [torch.int8, torch.float8_e4m3fn]


def quantise(cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of a cache; slots without a token get what there may be: any code, and NaN for a scale."""
    codes, scales = quantise_rows(cache.nan_to_num(1.0).float(), dtype)
    junk = torch.randint(-128, 128, codes.shape, dtype=torch.int8).view(dtype)
    empty = cache.isnan()
    return torch.where(empty, junk.view(torch.uint8), codes.view(torch.uint8)).view(dtype), scales.masked_fill(
        empty[..., 0], torch.nan
    )


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (40, 3.0)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("cache_dtype", QUANTISED)
@pytest.mark.parametrize("sequences", SHAPES)
def test_a_quantised_cache_matches_float64(
    sequences: list[tuple[int, int]],
    cache_dtype: torch.dtype,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    deterministic: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "deterministic", deterministic)
    q, cache, batch = make(sequences, dtype=dtype)
    codes, scales = quantise(cache, cache_dtype)
    options = {"scale": q.shape[2] ** -0.5, "window": window, "softcap": softcap, "kv_scales": scales}

    actual = paged_attention(q, codes, batch, **options)

    assert actual.dtype == q.dtype
    expected = reference.paged_attention(q.double(), codes, batch, **options)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])


@pytest.mark.parametrize("cache_dtype", QUANTISED)
def test_every_code_is_widened_to_its_value(cache_dtype: torch.dtype) -> None:
    """Beside 16-bit queries too, and with more codes than are widened at once; float8's NaN is never stored."""
    codes = torch.arange(-128, 128).to(torch.int8).view(cache_dtype)
    codes = codes[~codes.float().isnan()][:240].repeat(1200).view(-1, 2, 1, 16, 40)
    rows = CacheRows.of(codes, torch.ones(codes.shape[:4]))

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = rows.gather(torch.arange(len(rows.held)), 40, dtype)

        assert torch.equal(values.view(codes.shape), codes.to(dtype))


def test_reference_is_softmax_attention() -> None:
    """One head of size 1, scores 0 and log 3 for the last query: a quarter of the first value, three of the second."""
    keys = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    values = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
    batch = PagedBatch.build([0], [2], [[0]], block_size=2, device="cpu")

    out = reference.paged_attention(
        torch.ones(2, 1, 1), torch.stack((keys, values), 1), batch, scale=1.0, window=None, softcap=None
    )

    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 7.0]))


@pytest.mark.parametrize("sequences", [DECODE_EVEN, MIXED])
def test_queries_with_gaps_between_tokens(sequences: list[tuple[int, int]]) -> None:
    q, cache, batch = make(sequences)

    check(torch.cat((q, q), 1)[:, : q.shape[1]], cache, batch)


def test_sequences_that_share_a_prefix() -> None:
    cache = torch.randn(8, 2, 3, 16, 64)
    starts, lengths = [40, 33, 35, 32], [1, 1, 9, 20]
    tables = [[5, 2, 0], [5, 2, 7], [5, 2, 1], [5, 2, 3, 6]]
    batch = PagedBatch.build(starts, lengths, tables, block_size=16, device="cpu")

    check(torch.randn(31, 9, 64), cache, batch)


def test_no_tokens() -> None:
    out = paged_attention(*make([]), scale=1.0)

    assert out.shape == (0, 9 * 64)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_junk_in_unused_slots_changes_nothing(junk: float, dtype: torch.dtype, window: int | None) -> None:
    q, cache, batch = make([*MIXED[:4], (600, 100)], dtype=dtype)
    junked = cache.nan_to_num(junk) if junk != torch.nan else cache

    outs = [paged_attention(q, each, batch, scale=0.125, window=window) for each in (cache.nan_to_num(0.0), junked)]

    assert torch.equal(*outs)


def test_tokens_before_the_window_are_not_read() -> None:
    """Blocks wholly behind the window may belong to somebody else by now."""
    q, cache, batch = make([(100, 1), (90, 1), (96, 40)])
    clean = paged_attention(q, cache, batch, scale=0.125, window=20)
    for row, oldest in enumerate((81, 71, 77)):
        for block in batch.host_tables[row, : oldest // 16]:
            cache[block] = torch.nan

    assert torch.equal(paged_attention(q, cache, batch, scale=0.125, window=20), clean)


def test_one_sequence_gone_bad_stays_alone() -> None:
    q, cache, batch = make(DECODE_EVEN)
    clean = paged_attention(q, cache, batch, scale=0.125)
    cache[batch.host_tables[1, 0], 1, :, 3] = torch.nan

    out = paged_attention(q, cache, batch, scale=0.125)

    others = [0, 2, 3, 4]
    assert out[1].isnan().all()
    torch.testing.assert_close(out[others], clean[others])


@pytest.mark.parametrize("sequences", [DECODE_EVEN, DECODE_UNEVEN, MIXED])
def test_a_sequence_alone_gives_what_it_gives_in_a_batch(sequences: list[tuple[int, int]]) -> None:
    q, cache, batch = make(sequences)
    together = paged_attention(q, cache, batch, scale=0.125)

    row = 0
    for index, (start, length) in enumerate(sequences):
        alone = PagedBatch.build([start], [length], batch.host_tables[index : index + 1], block_size=16, device="cpu")
        out = paged_attention(q[row : row + length], cache, alone, scale=0.125)
        torch.testing.assert_close(out, together[row : row + length], rtol=1e-5, atol=1e-6)
        row += length


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    q, cache, batch = make([(0, 90)])
    whole = paged_attention(q, cache, batch, scale=0.125)

    for start, length in [(0, 32), (32, 1), (33, 57)]:
        chunk = PagedBatch.build([start], [length], batch.host_tables, block_size=16, device="cpu")
        out = paged_attention(q[start : start + length], cache, chunk, scale=0.125)
        torch.testing.assert_close(out, whole[start : start + length], rtol=1e-5, atol=1e-6)


def test_layers_of_several_kinds_share_a_batch() -> None:
    q, cache, batch = make(MIXED)
    for _ in range(2):
        for window, softcap in [(None, None), (20, None), (None, 5.0), (20, 5.0)]:
            check(q, cache, batch, window=window, softcap=softcap)
        check(q.bfloat16(), cache.bfloat16(), batch)
    check(*(tensor[..., :32].contiguous() for tensor in (q, cache)), batch)


def test_a_group_never_gathers_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_plan, "_GROUP_TOKENS", 64)
    q, cache, batch = make(DECODE_EVEN)

    plan = cpu_plan.make_plan(batch, 3, None, score_dtype=torch.float32, prefill_dtype=torch.float32, softcap=False)

    assert len(plan.groups) > 1
    assert all(group.sequences * group.width <= 64 for group in plan.groups)
    check(q, cache, batch)


def test_a_long_sequence_does_not_pad_the_short_ones() -> None:
    _, _, batch = make([(20, 1)] * 8 + [(1500, 1)])

    plan = cpu_plan.make_plan(batch, 3, None, score_dtype=torch.float32, prefill_dtype=torch.float32, softcap=False)

    assert sorted((group.sequences, group.width) for group in plan.groups) == [(1, 1504), (8, 32)]
