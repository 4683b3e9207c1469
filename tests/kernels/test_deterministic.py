"""In deterministic mode a row's bits are its own: neither other rows nor its place among them matter.

On one thread and on two, since torch divides work among threads by its size.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import (
    PagedBatch,
    QuantizedWeight,
    add_layer_norm,
    add_rms_norm,
    dispatch,
    gelu_mul,
    layer_norm,
    pack_linear,
    pack_quantized,
    paged_attention,
    quantize_float8,
    quantize_int,
    rms_norm,
    rope_kv_write,
    silu_mul,
)
from dashinfer_kernels.activation import reference as activation_reference
from dashinfer_kernels.attention import reference as attention_reference
from dashinfer_kernels.attention.cpu_invariant import KEY_TILE, query_tile
from dashinfer_kernels.norm import reference as norm_reference

pytestmark = pytest.mark.feature("Parallelism and recovery", "Same bits in any company")

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
ROWS = 75


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def _deterministic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _seeded: None) -> None:
    torch.set_num_threads(request.param)
    monkeypatch.setattr(dispatch, "deterministic", True)


def check_rows(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """`op` of some rows of x is the same rows of `op` of all: in order, shuffled, and at every offset of a few."""
    whole = op(x)
    for count in (1, 2, 16, 17, 50):
        for start in (0, 7):
            assert torch.equal(op(x[start : start + count]), whole[start : start + count])
    order = torch.randperm(len(x))
    assert torch.equal(op(x[order]), whole[order])
    for row in range(0, len(x), 9):
        assert torch.equal(op(x[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), [(129, 1536), (64, 96), (5, 2049)])
def test_linear(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if out_features == 129 else None

    check_rows(pack_linear(weight, bias), torch.randn(ROWS, in_features).to(dtype))


QUANTIZED: dict[str, Callable[[Tensor], QuantizedWeight]] = {
    "4 bits": partial(quantize_int, bits=4, group_size=32, symmetric=False),
    "8 bits": partial(quantize_int, bits=8, symmetric=True),
    "8 bits, groups": partial(quantize_int, bits=8, group_size=32, symmetric=True),
    "groups of 16": partial(quantize_int, bits=4, group_size=16, symmetric=True),
    "float8": quantize_float8,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_linear(name: str, activations: Literal["int8"] | None, dtype: torch.dtype) -> None:
    weight = QUANTIZED[name](torch.randn(129, 1536) * 1536**-0.5)
    layer = pack_quantized(weight, torch.randn(129).to(dtype), dtype=dtype, activations=activations)

    check_rows(layer, torch.randn(ROWS, 1536).to(dtype))


def test_linear_of_no_rows_and_of_rows_with_gaps() -> None:
    weight, x = torch.randn(8, 6), torch.randn(4, 12)[:, ::2]
    layer = pack_linear(weight)

    assert layer(x[:0]).shape == (0, 8)
    torch.testing.assert_close(layer(x.view(2, 2, 6)), (x @ weight.T).view(2, 2, 8))


@pytest.mark.parametrize("hidden", [37, 576, 3584])
def test_norms(hidden: int) -> None:
    weight = torch.randn(hidden)
    x = 5 * torch.randn(ROWS, hidden)

    check_rows(lambda rows: rms_norm(rows, weight, 1e-5, torch.bfloat16), x)
    check_rows(lambda rows: rms_norm(rows, weight, 1e-5), x)
    check_rows(lambda rows: add_rms_norm(rows, rows.clone(), weight, 1e-5), x)
    check_rows(lambda rows: layer_norm(rows, weight, weight, 1e-5), x)
    check_rows(lambda rows: add_layer_norm(rows, rows.clone(), weight, weight, 1e-5), x)
    expected = norm_reference.rms_norm(x.double(), weight.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intermediate", [37, 96, 1536])
@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul"])
def test_activations(name: str, intermediate: int, dtype: torch.dtype) -> None:
    op = {"silu_mul": silu_mul, "gelu_mul": gelu_mul}[name]
    x = (4 * torch.randn(ROWS, 2 * intermediate)).to(dtype)
    x[0, 0], x[0, 1] = -200, 200

    check_rows(op, x)
    expected = getattr(activation_reference, name)(x.double())
    torch.testing.assert_close(op(x).double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (24, 24)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_what_it_writes(head_dim: int, rotary_dim: int, normed: bool, dtype: torch.dtype) -> None:
    heads, kv_heads, block_size = 9, 3, 16
    angles = torch.randn(64, rotary_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1)
    norms = {name: torch.randn(head_dim) for name in ("q_norm", "k_norm")} if normed else {}

    def op(rows: Tensor) -> Tensor:
        """A row is its position, then what was projected."""
        cache = torch.zeros(-(-len(rows) // block_size), 2, kv_heads, block_size, head_dim, dtype=dtype)
        q = rope_kv_write(
            rows[:, 1:].to(dtype).clone(memory_format=torch.contiguous_format),
            rows[:, 0].long(),
            cos_sin,
            cache,
            torch.arange(len(rows)),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            **norms,
        )
        written = cache.permute(0, 3, 1, 2, 4).reshape(-1, 2 * kv_heads * head_dim)[: len(rows)]
        return torch.cat((q.reshape(len(rows), -1), written), 1)

    positions = torch.randint(0, 64, (ROWS, 1))
    check_rows(op, torch.cat((positions, torch.randn(ROWS, (heads + 2 * kv_heads) * head_dim)), 1))


# -- attention: one sequence's queries, with the same cache, however they are computed


class Conversations:
    """Sequences of known lengths with all their queries, keys and values, which a step may compute any part of."""

    def __init__(self, lengths: list[int], heads: tuple[int, int], head_dim: int, block_size: int, dtype: torch.dtype) -> None:
        self.block_size, self.heads = block_size, heads
        self.q = [torch.randn(length, heads[0], head_dim).to(dtype) for length in lengths]
        self.kv = [torch.randn(length, 2, heads[1], head_dim).to(dtype) for length in lengths]

    def attend(self, chunks: list[tuple[int, int, int]], **options) -> list[Tensor]:
        """Of chunks (sequence, start, length): what each attends to, in a cache that holds nothing else."""
        pages = [-(-(start + length) // self.block_size) for _, start, length in chunks]
        blocks = torch.randperm(sum(pages) + 3).tolist()
        tables = [[blocks.pop() for _ in range(count)] for count in pages]
        head_dim = self.q[0].shape[2]
        cache = torch.full((sum(pages) + 3, 2, self.heads[1], self.block_size, head_dim), torch.nan, dtype=self.q[0].dtype)
        for (sequence, start, length), table in zip(chunks, tables, strict=True):
            position = torch.arange(start + length)
            where = torch.tensor(table)[position // self.block_size], position % self.block_size
            cache.permute(0, 3, 1, 2, 4)[where] = self.kv[sequence][: start + length]
        starts, lengths = [chunk[1] for chunk in chunks], [chunk[2] for chunk in chunks]
        batch = PagedBatch.build(starts, lengths, tables, block_size=self.block_size, device="cpu")
        q = torch.cat([self.q[sequence][start : start + length] for sequence, start, length in chunks])
        out = paged_attention(q, cache, batch, scale=head_dim**-0.5, **options)
        expected = attention_reference.paged_attention(
            q.double(), cache.double(), batch, scale=head_dim**-0.5, **{"window": None, "softcap": None, **options}
        )
        torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])
        return list(out.split(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"window": 40, "softcap": 3.0}, {"window": 1}])
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [((9, 3), 64, 16), ((4, 2), 16, 8), ((5, 1), 80, 256)])
def test_attention(heads: tuple[int, int], head_dim: int, block_size: int, options: dict, dtype: torch.dtype) -> None:
    length = KEY_TILE + 22
    sequences = Conversations([length, 2 * KEY_TILE + 9, 5], heads, head_dim, block_size, dtype)
    (whole,) = sequences.attend([(0, 0, length)], **options)

    for cuts in ([1, 20, 51, KEY_TILE - 1], [KEY_TILE + 1]):
        for start, end in pairwise([0, *cuts, length]):
            parts = sequences.attend([(2, 4, 1), (1, 200, 1), (1, 3, 9), (0, start, end - start)], **options)
            assert torch.equal(parts[-1], whole[start:end])
    decoded = [(0, position, 1) for position in (0, 7, KEY_TILE - 1, KEY_TILE, length - 1)]
    batched = sequences.attend([(1, 2 * KEY_TILE, 1), *decoded, (2, 0, 1), (1, 100, 70)], **options)
    for chunk, row in zip(decoded, batched[1:], strict=False):
        assert torch.equal(row[0], whole[chunk[1]])
        assert torch.equal(sequences.attend([chunk], **options)[0], row)


@pytest.mark.parametrize(("shared", "expected"), [(1, 8), (2, 4), (3, 4), (4, 2), (7, 2), (8, 1), (12, 1)])
def test_query_tiles_have_at_least_eight_rows(shared: int, expected: int) -> None:
    assert query_tile(4 * shared, 4) == expected
