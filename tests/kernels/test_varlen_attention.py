"""Attention within sequences against its float64 definition, on the CPU path and through the kernel."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import dispatch, varlen_attention
from dashinfer_kernels.varlen_attention import launch, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

ONE_TOKEN = [1]
IMAGES = [130, 1, 70]
WINDOWS = [64] * 3
RAGGED_WINDOWS = [64, 64, 32, 64, 64, 32, 8, 0, 64, 4]
EMPTY = [0, 3, 0, 0, 65, 0]
SHAPES = [ONE_TOKEN, IMAGES, WINDOWS, RAGGED_WINDOWS, EMPTY]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing was written to is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def make(
    lengths: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 64,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """q, k and v as slices of one product, between NaN, and the sequences."""
    tokens, width = sum(lengths), (heads[0] + 2 * heads[1]) * head_dim
    storage = torch.full((tokens + 2, width + 16), torch.nan, dtype=dtype, device=device)
    qkv = storage[1:-1, 8:-8]
    qkv.copy_(torch.randn(tokens, width))
    q, k, v = qkv.split([heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim], 1)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return *(x.unflatten(1, (-1, head_dim)) for x in (q, k, v)), cu_seqlens, max(lengths, default=0)


def check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    scale = q.shape[2] ** -0.5
    actual = varlen_attention(q, k, v, cu_seqlens, max_seqlen, scale=scale)
    assert actual.dtype == q.dtype
    expected = reference.varlen_attention(q.double(), k.double(), v.double(), cu_seqlens, scale=scale)
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[q.dtype], atol=TOLERANCE[q.dtype])


def test_reference_is_softmax_attention_within_sequences() -> None:
    """One head of size 1: scores 0 and log 3 for both tokens of a sequence, and a sequence of one."""
    keys, values = torch.tensor([0.0, math.log(3), 5.0]).view(3, 1, 1), torch.tensor([4.0, 8.0, 9.0]).view(3, 1, 1)

    out = reference.varlen_attention(torch.ones(3, 1, 1), keys, values, torch.tensor([0, 2, 3]), scale=1.0)

    torch.testing.assert_close(out.flatten(), torch.tensor([7.0, 7.0, 9.0]))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("lengths", SHAPES)
def test_matches_float64(lengths: list[int], dtype: torch.dtype) -> None:
    check(*make(lengths, dtype=dtype))


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (3, 1)])
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
def test_head_counts_and_sizes(head_dim: int, heads: tuple[int, int]) -> None:
    check(*make([5, 20, 5], heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("lengths", SHAPES)
def test_kernel_matches_float64(lengths: list[int], triton_path: str) -> None:
    check(*make(lengths, dtype=torch.float16, device=triton_path))


@pytest.mark.parametrize(
    ("head_dim", "heads"), [(64, (3, 3)), (72, (2, 1)), (80, (2, 2)), (88, (1, 1)), (96, (3, 1)), (128, (4, 2))]
)
def test_kernel_head_counts_and_sizes(head_dim: int, heads: tuple[int, int], triton_path: str) -> None:
    check(*make([66, 1, 7], dtype=torch.float16, heads=heads, head_dim=head_dim, device=triton_path))


@pytest.mark.parametrize("head_dim", [72, 128])
def test_kernel_float32(head_dim: int, triton_path: str) -> None:
    check(*make([33, 2, 16], head_dim=head_dim, device=triton_path))


def test_kernel_searches_many_sequences(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_SEQUENCES_AT_ONCE", 4)

    check(*make([0, 3, 130, 0, 0, 1, 64, 0, 129, 0], dtype=torch.float16, heads=(1, 1), device=triton_path))


@pytest.mark.parametrize("triton", [False, True])
def test_no_tokens(triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreting", triton)
    for lengths in ([], [0, 0]):
        q, k, v, cu_seqlens, _ = make(lengths)

        assert varlen_attention(q, k, v, cu_seqlens, 0, scale=1.0).shape == (0, 2 * 64)


@pytest.mark.parametrize("triton", [False, True])
def test_heads_before_tokens(triton: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_path") if triton else "cpu"
    *qkv, cu_seqlens, longest = make([20, 7], dtype=torch.float16, head_dim=72, device=device)

    check(*(x.transpose(0, 1).contiguous().transpose(0, 1) for x in qkv), cu_seqlens, longest)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("lengths", [IMAGES, RAGGED_WINDOWS])
def test_one_sequence_gone_bad_stays_alone(lengths: list[int], triton: bool, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue("triton_path") if triton else "cpu"
    q, k, v, cu_seqlens, longest = make(lengths, dtype=torch.float16, head_dim=80, device=device)
    clean = varlen_attention(q, k, v, cu_seqlens, longest, scale=0.1)
    bad = slice(*cu_seqlens[1:3].tolist())
    k[bad], v[bad] = torch.nan, torch.nan

    out = varlen_attention(q, k, v, cu_seqlens, longest, scale=0.1)

    assert out[bad].isnan().all()
    clean[bad] = out[bad] = 0
    torch.testing.assert_close(out, clean)


@pytest.mark.parametrize("triton", [False, True])
def test_large_scores(triton: bool, request: pytest.FixtureRequest) -> None:
    """Scores of several hundred, ascending and descending from tile to tile."""
    device = request.getfixturevalue("triton_path") if triton else "cpu"
    q, k, v, cu_seqlens, longest = make([200, 150], dtype=torch.float16, heads=(1, 1), device=device)
    k.copy_(torch.linspace(-5, 5, 350, device=device).view(-1, 1, 1).expand_as(k))
    q.copy_(torch.linspace(-12, 12, 350, device=device).view(-1, 1, 1).expand_as(q))

    check(q, k, v, cu_seqlens, longest)


@pytest.mark.parametrize("lengths", [IMAGES, RAGGED_WINDOWS])
def test_deterministic_rows_do_not_depend_on_the_batch(
    lengths: list[int], triton_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "deterministic", True)
    q, k, v, cu_seqlens, longest = make(lengths, dtype=torch.float16, heads=(1, 1), device=triton_path)
    together = varlen_attention(q, k, v, cu_seqlens, longest, scale=0.125)

    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        alone = torch.tensor([0, end - begin], dtype=torch.int32, device=triton_path)
        rows = (x[begin:end] for x in (q, k, v))
        assert torch.equal(varlen_attention(*rows, alone, end - begin, scale=0.125), together[begin:end])


def test_a_launch_reads_no_lengths(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid follows from sizes alone, and is no larger than either way of laying it out needs."""
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> "Kernel":
            grids.append(grid)
            return self

        def __call__(self, **arguments: object) -> None:
            grids[-1] += (arguments["USE_SEARCH"], arguments["BLOCK_M"])

    monkeypatch.setattr(launch, "_kernel", lambda: type("Module", (), {"varlen_attention_kernel": Kernel()}))
    monkeypatch.setattr(Tensor, "tolist", None)
    for lengths in ([64] * 1000, [16000, *[64] * 100]):
        q, k, v, *_ = make([sum(lengths)], dtype=torch.float16, head_dim=16, device=triton_path)
        unread = torch.empty(len(lengths) + 1, dtype=torch.float32, device=triton_path).to(torch.int32)
        varlen_attention(q, k, v, unread, max(lengths), scale=1.0)

    assert grids == [(1000, 2, False, 64), (101 + 22400 // 128, 2, True, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128])
@pytest.mark.parametrize("lengths", [*SHAPES, [4096, 1000, 3], [64] * 3000])
def test_kernel_bfloat16(lengths: list[int], head_dim: int, triton_path: str) -> None:
    if triton_path != "cuda":
        pytest.skip("the interpreter multiplies bfloat16 wrongly")
    check(*make(lengths, dtype=torch.bfloat16, heads=(4, 2), head_dim=head_dim, device=triton_path))


@pytest.mark.gpu
def test_kernel_addresses_beyond_32_bits(triton_path: str) -> None:
    if triton_path != "cuda" or torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    tokens, width = 70400, 32768
    storage = torch.empty_strided((tokens, width), (width, 1), dtype=torch.bfloat16, device="cuda")
    q, k, v = (storage[:, first : first + 160].unflatten(1, (2, 80)) for first in (0, 160, 320))
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    for lengths in ([64] * 1100, [tokens - 200, 200]):
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
        last = slice(tokens - lengths[-1], tokens)

        actual = varlen_attention(q, k, v, cu_seqlens, max(lengths), scale=0.1)[last]

        only = torch.tensor([0, lengths[-1]], dtype=torch.int32)
        expected = reference.varlen_attention(*(x[last].double() for x in (q, k, v)), only, scale=0.1)
        torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
