"""Compiled loops beside the torch paths of the same ops on CPU."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import (
    PagedBatch,
    add_rms_norm,
    dispatch,
    gelu_mul,
    loops,
    paged_attention,
    rope_kv_write,
    silu_mul,
    threads,
    warm_up_loops,
)
from dashinfer_kernels.activation import cpu

pytestmark = pytest.mark.skipif(not loops.enabled, reason="needs Numba")

ROWS = [1, 3, 300]
TOLERANCE = {"rtol": 1e-2, "atol": 1e-2}  # of bfloat16 results that are rounded once or twice


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any]]:
    """Calls a function twice: with loops, then without."""

    def call(function: Callable[..., Any]) -> tuple[Any, Any]:
        with_loops = function()
        monkeypatch.setattr(loops, "enabled", False)
        without = function()
        monkeypatch.setattr(loops, "enabled", True)
        return with_loops, without

    return call


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("hidden", [37, 576])
def test_add_rms_norm(rows: int, hidden: int, both: Callable[..., tuple[Any, Any]]) -> None:
    x, start, weight = bf16(rows, hidden), torch.randn(rows, hidden), torch.randn(hidden)

    def run() -> tuple[Tensor, Tensor]:
        residual = start.clone()
        return add_rms_norm(x, residual, weight, 1e-5), residual

    (actual, residual), (expected, expected_residual) = both(run)

    assert torch.equal(residual, expected_residual)
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("op", [silu_mul, gelu_mul])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("intermediate", [1, 37, 1536])
def test_activation(op: Callable[[Tensor], Tensor], rows: int, intermediate: int, both: Callable[..., tuple[Any, Any]]) -> None:
    gate_up = 5 * bf16(rows, 2 * intermediate)

    actual, expected = both(lambda: op(gate_up))

    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_activation_of_extreme_gates(both: Callable[..., tuple[Any, Any]]) -> None:
    gates = torch.tensor([-3e38, -1000.0, -88.0, -30.0, -0.0, 0.0, 30.0, 88.0, 1000.0, 1e30, torch.nan])
    gate_up = torch.cat((gates, torch.full_like(gates, 0.5))).bfloat16()[None]

    actual, expected = both(lambda: silu_mul(gate_up))

    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (20, 20), (64, 16)])
def test_rope_kv_write(rows: int, head_dim: int, rotary_dim: int, both: Callable[..., tuple[Any, Any]]) -> None:
    heads, kv_heads, block_size = 6, 2, 4
    start, cos_sin = bf16(rows, (heads + 2 * kv_heads) * head_dim), torch.randn(50, rotary_dim)
    positions, slots = torch.randint(0, 50, (rows,)), torch.randperm(4 * 80)[:rows]
    slots[rows // 2] = -1

    def run() -> tuple[Tensor, Tensor]:
        cache = torch.full((80, 2, kv_heads, block_size, head_dim), torch.nan, dtype=torch.bfloat16)
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        return rope_kv_write(start.clone(), positions, cos_sin, cache, slots, **sizes), cache

    (actual, cache), (expected, expected_cache) = both(run)

    torch.testing.assert_close(actual, expected, **TOLERANCE)
    torch.testing.assert_close(cache, expected_cache, **TOLERANCE, equal_nan=True)


@pytest.mark.parametrize(("position", "slot"), [(50, 0), (-1, 0), (0, 64)])
def test_rope_kv_write_stays_in_its_tables(position: int, slot: int) -> None:
    cache, tables = torch.zeros(16, 2, 1, 4, 8, dtype=torch.bfloat16), torch.zeros(50, 8)
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}

    with pytest.raises(IndexError):
        rope_kv_write(bf16(1, 24), torch.tensor([position]), tables, cache, torch.tensor([slot]), **sizes)


@pytest.mark.parametrize("contexts", [[1], [150], [17, 1, 40, 16], [5] * 32])
@pytest.mark.parametrize("prefills", [[], [3, 20]])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 20), (7, 1, 16)])
def test_decode_attention(
    contexts: list[int],
    prefills: list[int],
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    both: Callable[..., tuple[Any, Any]],
) -> None:
    block_size = 16
    lengths = [1] * len(contexts) + prefills
    contexts = contexts + [length + 30 for length in prefills]
    counts = [-(-context // block_size) for context in contexts]
    blocks = iter(torch.randperm(sum(counts)).tolist())
    tables = [[next(blocks) for _ in range(count)] for count in counts]
    cache = torch.full((sum(counts), 2, kv_heads, block_size, head_dim), torch.nan, dtype=torch.bfloat16)
    for table, context in zip(tables, contexts, strict=True):
        for place in range(context):
            cache[table[place // block_size], :, :, place % block_size] = bf16(2, kv_heads, head_dim)
    q = bf16(sum(lengths), heads + 2, head_dim)[:, :heads]  # as a part of the projection

    def run() -> Tensor:
        starts = [context - length for context, length in zip(contexts, lengths, strict=True)]
        batch = PagedBatch.build(starts, lengths, tables, block_size=block_size, device="cpu")
        return paged_attention(q, cache, batch, scale=head_dim**-0.5, window=window)

    actual, expected = both(run)

    torch.testing.assert_close(actual, expected, **TOLERANCE)


def test_decode_attention_stays_in_its_cache() -> None:
    cache = torch.zeros(4, 2, 1, 16, 8, dtype=torch.bfloat16)
    batch = PagedBatch.build([20], [1], [[3, 4]], block_size=16, device="cpu")

    with pytest.raises(IndexError):
        paged_attention(bf16(1, 1, 8), cache, batch, scale=1.0)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.full((1, 8), torch.nan, dtype=torch.bfloat16)
    cache = torch.full((1, 2, 1, 16, 8), torch.nan, dtype=torch.bfloat16)
    batch = PagedBatch.build([3], [1], [[0]], block_size=16, device="cpu")

    assert add_rms_norm(x, torch.ones(1, 8), torch.ones(8), 1e-5).isnan().all()
    assert silu_mul(x).isnan().all()
    assert paged_attention(x[None], cache, batch, scale=1.0).isnan().all()


def test_deterministic_mode_and_many_rows_for_one_thread_take_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_loop", lambda: pytest.fail("the loop was taken"))
    silu_mul(torch.randn(1, 8))
    monkeypatch.setattr(threads, "parallel", None)
    silu_mul(bf16(loops.MAX_ROWS_ALONE + 1, 8))
    monkeypatch.setattr(dispatch, "deterministic", True)
    silu_mul(bf16(1, 8))


def fail(*_: object) -> None:
    raise ImportError("Numba needs NumPy 2.2 or less")


@pytest.mark.usefixtures("_compiled_anew")
def test_a_numba_that_does_not_work_leaves_the_torch_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "import_module", fail)
    gate_up = bf16(3, 8)

    with pytest.warns(RuntimeWarning, match=r"NumPy 2\.2 or less"):
        warm_up_loops(torch.bfloat16)
    actual = silu_mul(gate_up)
    monkeypatch.setattr(loops, "enabled", False)

    assert torch.equal(actual, silu_mul(gate_up))


@pytest.fixture
def _compiled_anew() -> Iterator[None]:
    loops.compile_all.cache_clear()
    yield
    loops.compile_all.cache_clear()


@pytest.mark.usefixtures("_compiled_anew")
def test_warming_up_compiles_for_bfloat16_alone() -> None:
    for name in [name for name in sys.modules if name.endswith(".cpu_loop")]:
        del sys.modules[name]

    warm_up_loops(torch.float32)
    assert not any(name.endswith(".cpu_loop") for name in sys.modules)
    warm_up_loops(torch.bfloat16)
    assert sum(name.endswith(".cpu_loop") for name in sys.modules) == 5


@pytest.mark.parametrize("elements", [1, 1 << 30], ids=["a thread", "threads"])
def test_tasks_that_no_thread_had_memory_for_are_missed(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dashinfer_kernels.compiled import Loop, given, take

    @Loop
    def count(work):
        _, tasks, _, threads, short = given(work, 5)
        if take(threads) < short:
            raise MemoryError
        while take(work) < tasks:
            take(work + 16)

    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    threads, all_but_one = torch.zeros(1, dtype=torch.int64), 0 if elements == 1 else torch.get_num_threads() - 1

    assert count(5, elements, threads.zero_().data_ptr(), all_but_one) == 5
    with pytest.raises(MemoryError, match="scratch"):
        count(5, elements, threads.zero_().data_ptr(), 1 << 30)
    assert len(told) >= all_but_one + 1


def test_code_is_kept_until_any_file_of_loops_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dashinfer_kernels import compiled

    file = tmp_path / "nothing.py"
    file.write_text("from dashinfer_kernels.compiled import Loop\n\n\n@Loop\ndef nothing(work):\n    pass\n")

    def hits() -> int:
        return run_path(str(file))["nothing"]._compiled.cache_hits

    assert [hits(), hits()] == [0, 1]
    monkeypatch.setattr(compiled, "_sources", lambda: "other functions that it calls")
    assert [hits(), hits()] == [0, 1]
