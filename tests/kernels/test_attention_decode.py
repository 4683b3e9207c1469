"""Decode attention's kernels against the float64 definition.

Keys and values (of quantised caches, their scales) are NaN except where a sequence has a token that somebody sees, table
entries beyond a context point nowhere, and outputs are NaN before.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import PagedBatch, dispatch, paged_attention
from dashinfer_kernels.attention import decode, reference
from dashinfer_kernels.attention.decode import Config

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SMALL = Config(block_n=16, num_warps=4, num_stages=2, min_chunk=2)  # splits after 32 tokens
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn


@dataclass
class Case:
    """A step of decoding sequences; a context of 0 is padding."""

    q: Tensor
    cache: Tensor
    batch: PagedBatch
    scales: Tensor | None
    window: int | None
    softcap: float | None
    query_len: int

    def expected(self) -> Tensor:
        """[tokens, num_heads * head_dim] float64."""
        cache = self.cache.double()
        if self.scales is not None:
            cache = cache * self.scales.double().unsqueeze(-1)
        cache.nan_to_num_(0)
        out = reference.paged_attention(
            self.q.double(), cache, self.batch, scale=0.125, window=self.window, softcap=self.softcap
        )
        out[(self.batch.context_lengths == 0).repeat_interleave(self.query_len)] = 0
        return out

    def actual(self, config: Config | None = SMALL) -> Tensor:
        out = torch.full((len(self.q), self.q[0].numel()), torch.nan, dtype=self.q.dtype, device=self.q.device)
        decode.paged_attention(
            self.q,
            self.cache,
            self.batch,
            out,
            scale=0.125,
            window=self.window,
            softcap=self.softcap,
            kv_scales=self.scales,
            query_len=self.query_len,
            config=config,
        )
        return out

    def check(self, config: Config | None = SMALL) -> None:
        tolerance = TOLERANCE[self.q.dtype if self.scales is None or self.q.dtype == torch.bfloat16 else torch.float16]
        actual, expected = (out.double().unflatten(1, (-1, self.q.shape[2])) for out in (self.actual(config), self.expected()))
        largest = expected.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        torch.testing.assert_close(actual / largest, expected / largest, rtol=0, atol=tolerance)


def make(
    contexts: list[int],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    block_size: int = 8,
    window: int | None = None,
    softcap: float | None = None,
    query_len: int = 1,
) -> Case:
    lengths = [max(context, query_len) for context in contexts]
    pages = [-(-length // block_size) for length in lengths]
    free = torch.randperm(sum(pages) + 3).tolist()
    tables = [[free.pop() for _ in range(count)] for count in pages]
    values = torch.full((sum(pages) + 3, 2, heads[1], block_size, head_dim), torch.nan)
    for context, table in zip(contexts, tables, strict=True):
        oldest = 0 if window is None else max(0, context - query_len - window + 1)
        for page, block in enumerate(table):
            low, high = max(0, oldest - page * block_size), min(block_size, context - page * block_size)
            if low < high:
                values[block, :, :, low:high] = torch.randn(2, heads[1], high - low, head_dim)
    scales = None
    cache = values.to(dtype)
    if cache_dtype is not None:
        values[:, 1] *= torch.logspace(-4, 2, heads[1]).view(-1, 1, 1)  # weights times scales must not lose small values
        scales = values.abs().amax(-1) / (127 if cache_dtype == INT8 else 448)
        stored = values / scales.unsqueeze(-1)
        cache = (stored.round().nan_to_num(77) if cache_dtype == INT8 else stored).to(cache_dtype)
    batch = PagedBatch.build(
        [length - query_len for length in lengths], [query_len] * len(lengths), tables, block_size=block_size, device=device
    )
    batch = replace(batch, num_decodes=len(contexts), context_lengths=torch.tensor(contexts, dtype=torch.int32, device=device))
    for row, count in enumerate(pages):
        batch.block_tables[row, count:] = 1 << 30
    q = torch.randn(sum(batch.host_lengths), *(heads[0], head_dim)).to(dtype).to(device)
    scales = None if scales is None else scales.to(device)
    return Case(q, cache.to(device), batch, scales, window, softcap, query_len)


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size", "dtype"),
    [
        ((4, 4), 64, 16, torch.float32),
        ((9, 3), 80, 8, torch.float16),
        ((6, 1), 96, 64, torch.float32),
        ((7, 1), 128, 32, torch.float16),
        ((4, 2), 256, 16, torch.float32),
        ((20, 1), 16, 8, torch.float16),
        ((70, 1), 16, 8, torch.float32),
    ],
)
def test_matches_float64(heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype, triton_path: str) -> None:
    make([1, 70, 16, 33], triton_path, dtype=dtype, heads=heads, head_dim=head_dim, block_size=block_size).check()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (30, None), (30, 2.0), (None, 2.0)])
@pytest.mark.parametrize("query_len", [1, 3])
def test_options(query_len: int, window: int | None, softcap: float | None, triton_path: str) -> None:
    make([3, 70, 40], triton_path, window=window, softcap=softcap, query_len=query_len).check()


@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (128, 256)])
def test_launch_parameters_of_the_heuristic(head_dim: int, block_size: int, triton_path: str) -> None:
    make([400, 1, 129], triton_path, dtype=torch.float16, head_dim=head_dim, block_size=block_size).check(None)


@pytest.mark.parametrize("has_float8", [True, False])
@pytest.mark.parametrize(
    "cache_dtype",
    [
        pytest.param(INT8, marks=pytest.mark.feature("Quantisation", "KV cache of 8-bit integers")),
        pytest.param(FLOAT8, marks=pytest.mark.feature("Quantisation", "KV cache of float8")),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "query_len", "window", "softcap"), [(torch.float16, 1, None, None), (torch.float32, 2, 20, 2.0)]
)
def test_quantised_caches(
    dtype: torch.dtype,
    query_len: int,
    window: int | None,
    softcap: float | None,
    cache_dtype: torch.dtype,
    has_float8: bool,
    triton_path: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not has_float8:
        monkeypatch.setattr(decode, "_has_float8", lambda _: False)
    case = make(
        [70, 2, 16], triton_path, dtype=dtype, cache_dtype=cache_dtype, query_len=query_len, window=window, softcap=softcap
    )
    case.check()


def test_every_float8_value_is_converted(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token whose values are all bytes but the two NaN."""
    monkeypatch.setattr(decode, "_has_float8", lambda _: False)
    case = make([1], triton_path, dtype=torch.float32, cache_dtype=FLOAT8, heads=(1, 1), head_dim=256)
    every = torch.arange(256, dtype=torch.uint8).masked_fill(torch.arange(256) % 128 == 127, 0).view(FLOAT8)
    case.cache.view(torch.uint8)[case.batch.block_tables[0, 0], 1, 0, 0] = every.view(torch.uint8).to(triton_path)
    case.scales.nan_to_num_(1)[:] = 1

    assert torch.equal(case.actual()[0].cpu(), every.float())


def test_padding_is_zeros(triton_path: str) -> None:
    for query_len in (1, 2):
        case = make([0, 40, 0, 3, 0], triton_path, query_len=query_len)

        case.check()

        padding = (case.batch.context_lengths == 0).repeat_interleave(query_len)
        assert (case.actual()[padding] == 0).all()
    assert (make([0, 0], triton_path).actual() == 0).all()


def test_more_pieces_than_are_merged_at_once(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "choose_merge_tile", lambda *_: (4, 32))
    case = make([160, 20], triton_path)
    case.q.mul_(10)

    case.check(replace(SMALL, min_chunk=1, programs=50))

    assert next(iter(case.batch.plans.values())).item_starts.tolist() == [0, 10, 12]


def test_scores_out_of_exp2s_range(triton_path: str) -> None:
    case = make([120, 5], triton_path)
    case.q.mul_(1000)

    case.check()


def test_queries_with_gaps_between_tokens(triton_path: str) -> None:
    case = make([20, 40], triton_path)
    case.q = torch.cat((case.q, torch.full_like(case.q, torch.nan)), 1)[:, : case.q.shape[1]]

    case.check()


def test_layers_share_what_a_step_makes(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make_plan = decode.make_plan
    monkeypatch.setattr(decode, "make_plan", lambda *args: made.append(args) or make_plan(*args))
    case = make([90, 20], triton_path)
    for _ in range(2):
        case.check()
        replace(case, cache=case.cache * 2, q=case.q / 2).check()
        replace(case, window=200).check()

    assert len(made) == 2


def test_public_function_takes_decoding_sequences_here(triton_path: str) -> None:
    case = make([90, 20], triton_path)
    out = paged_attention(case.q, case.cache, case.batch, scale=0.125)

    assert torch.equal(out, case.actual(None))


@pytest.mark.parametrize("cache_dtype", [None, INT8])
def test_public_function_of_mixed_batches(cache_dtype: torch.dtype | None, triton_path: str) -> None:
    case = make([90, 20, 33], triton_path, cache_dtype=cache_dtype)
    batch = PagedBatch.build([89, 19, 22], [1, 1, 11], case.batch.host_tables, block_size=8, device=triton_path)
    case = replace(case, q=torch.randn(13, 4, 16, device=triton_path), batch=batch)
    out = paged_attention(case.q, case.cache, batch, scale=0.125, kv_scales=case.scales)

    tolerance = 1e-5 if cache_dtype is None else 2e-3
    expected = reference.paged_attention(
        case.q.double(), case.cache, batch, scale=0.125, window=None, softcap=None, kv_scales=case.scales
    )
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def items(contexts: list[int], device: str, *, heads: tuple[int, int] = (28, 4), window: int | None = None) -> list[list[int]]:
    """The work items [sequence, first tile, tiles, pieces] of a step."""
    case = make([1] * len(contexts), device, heads=heads)
    case.batch.context_lengths[:] = torch.tensor(contexts)
    case.batch.block_tables = case.batch.block_tables.expand(-1, -(-max(contexts) // 8))
    plan = decode.make_plan(case.q, case.batch, heads[1], window, 1, decode.choose_config(128, 2, 16))
    count = int(plan.item_starts[-1])
    assert count <= plan.max_items
    found = plan.items[:count].tolist()
    starts = plan.item_starts.tolist()
    assert [record[0] for record in found] == [s for s in range(len(contexts)) for _ in range(starts[s], starts[s + 1])]
    return found


LENGTHS = {
    "one": [131072],
    "even": [4096] * 32,
    "skewed": [4096] * 8 + [131072] + [4096] * 7,
    "ragged": [int(x) for x in torch.logspace(0, 5, 25)],
    "short": [0, 1, 64, 65, 0] * 5,
}


@pytest.mark.parametrize(("window", "deterministic"), [(None, False), (5000, True)])
@pytest.mark.parametrize("name", ["one", "skewed", "ragged", "short"])
def test_items_cover_each_tile_once(
    name: str, window: int | None, deterministic: bool, triton_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "deterministic", deterministic)
    found = items(LENGTHS[name], triton_path, window=window)

    for sequence, context in enumerate(LENGTHS[name]):
        own = [record for record in found if record[0] == sequence]
        first = 0 if window is None else max(0, context - window) // 64
        tiles = [tile for _, begin, count, _ in own for tile in range(begin, begin + count)]
        assert tiles == list(range(first, -(-context // 64)))
        assert all(record[3] == len(own) for record in own)
        assert not own or max(r[2] for r in own) - min(r[2] for r in own) <= 1


@pytest.mark.parametrize("name", ["one", "even", "skewed", "ragged"])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_work_fills_the_device_evenly(name: str, kv_heads: int, triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 132 multiprocessors, no program has more than half of what each multiprocessor has on average."""
    monkeypatch.setattr(decode, "_multiprocessors", lambda _: 132)
    found = items(LENGTHS[name], triton_path, heads=(8, kv_heads))

    total = sum(record[2] for record in found) * kv_heads
    assert max(record[2] for record in found) <= total / 132 / 2
    assert len(found) * kv_heads >= 2 * 132


def test_a_row_depends_on_itself_alone_in_deterministic_mode(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "deterministic", True)
    monkeypatch.setattr(decode, "_FIXED_CHUNK_TOKENS", 32)
    case = make([150, 33, 0, 70], triton_path)
    together = case.actual()

    case.check()
    for row in range(4):
        lengths, tables = (x[row : row + 1] for x in (case.batch.context_lengths, case.batch.block_tables))
        alone = PagedBatch.build([0], [1], tables.cpu(), block_size=8, device=triton_path)
        alone = replace(alone, context_lengths=lengths, block_tables=tables)
        assert torch.equal(replace(case, q=case.q[row : row + 1], batch=alone).actual(), together[row : row + 1])


def test_deterministic_pieces_are_bounded(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "deterministic", True)
    found = items([131072, 2048, 1024], triton_path)

    assert [sum(record[0] == sequence for record in found) for sequence in range(3)] == [32, 2, 1]


def test_reference_of_a_quantised_cache_is_that_of_its_values() -> None:
    for cache_dtype in (INT8, FLOAT8):
        case = make([40, 9], "cpu", cache_dtype=cache_dtype)
        plain = case.cache.double() * case.scales.double().unsqueeze(-1)
        options = {"scale": 0.125, "window": None, "softcap": None}

        expected = reference.paged_attention(case.q.double(), plain, case.batch, **options)
        torch.testing.assert_close(case.expected(), expected)
        out = paged_attention(case.q, case.cache, case.batch, scale=0.125, kv_scales=case.scales)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, INT8, FLOAT8])
@pytest.mark.parametrize("query_len", [1, 4, 8])
@pytest.mark.parametrize(("heads", "head_dim"), [((28, 4), 128), ((9, 3), 64), ((8, 8), 80), ((8, 4), 256), ((32, 8), 96)])
def test_bfloat16_of_real_shapes(
    heads: tuple[int, int], head_dim: int, query_len: int, cache_dtype: torch.dtype | None, triton_path: str
) -> None:
    case = make(
        [5000, 8, 0, 700, 1030],
        triton_path,
        dtype=torch.bfloat16,
        cache_dtype=cache_dtype,
        heads=heads,
        head_dim=head_dim,
        block_size=16,
        query_len=query_len,
    )
    case.check(None)


@needs_gpu
@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31(triton_path: str) -> None:
    if torch.cuda.mem_get_info()[0] < 7 << 30:
        pytest.skip("needs 7 GiB of device memory")
    case = make([300], triton_path, dtype=torch.float16, heads=(8, 8), head_dim=128, block_size=16)
    expected = case.actual(None)
    block_elements = case.cache[0].numel()
    far = 2**31 // block_elements + 10
    cache = torch.empty(far + len(case.cache), *case.cache.shape[1:], dtype=torch.float16, device=triton_path)
    cache[far:] = case.cache
    case.batch.block_tables += far

    assert torch.equal(replace(case, cache=cache).actual(None), expected)


@needs_gpu
@pytest.mark.gpu
def test_a_captured_graph_follows_the_context_lengths(triton_path: str) -> None:
    """The launch that deals the work is part of the graph when plans are cleared before capturing."""
    case = make([3000, 500, 64, 9], triton_path, dtype=torch.float16, head_dim=128, heads=(8, 2), block_size=16)
    case.actual(None)
    case.batch.plans.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.actual(None)
    for contexts in ([3000, 500, 64, 9], [17, 0, 63, 0], [2999, 499, 64, 1]):
        case.batch.context_lengths.copy_(torch.tensor(contexts))
        graph.replay()
        found = out.clone()
        case.batch.plans.clear()

        assert torch.equal(found, case.actual(None))
