"""All layers in one loop beside the ops that they are made of."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_quant_cpu import random_weight
from torch import Tensor

from dashinfer_kernels import (
    DecodeLayers,
    LayerParts,
    PagedBatch,
    add_rms_norm,
    can_decode,
    dispatch,
    loops,
    pack_linear,
    pack_quantized,
    paged_attention,
    rope_kv_write,
    silu_mul,
)
from dashinfer_kernels.decode_layers import cpu
from dashinfer_kernels.linear import cpu as linear_cpu
from dashinfer_kernels.quant_matmul import cpu_tiles

pytestmark = pytest.mark.skipif(not cpu_tiles.fits(random_weight(16, 16), torch.bfloat16), reason="needs Numba and AVX512-BF16")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, EPS, BLOCK_SIZE = 64, 6, 2, 16, 160, 1e-5, 4
SIZES = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
SHAPES = ((10 * HEAD_DIM, HIDDEN), (HIDDEN, HEADS * HEAD_DIM), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
NORM, COS_SIN = torch.full((HIDDEN,), 1.5), torch.cat((torch.ones(50, 6), 0.01 * torch.arange(50)[:, None].expand(50, 6)), 1)


def layer(bits: int, group_size: int | None, *, bias: bool = False, window: int | None = None) -> LayerParts:
    qkv, output, gate_up, down = (
        pack_quantized(
            random_weight(*shape, bits=bits, group_size=group_size),
            torch.randn(shape[0]).bfloat16() if bias else None,
            dtype=torch.bfloat16,
        )
        for shape in SHAPES
    )
    norms = {"input_norm": 0.5 + torch.rand(HIDDEN), "mlp_norm": 0.5 + torch.rand(HIDDEN)}
    return LayerParts(qkv=qkv, output=output, gate_up=gate_up, down=down, window=window, **norms)


def wide_layer(*, intermediate: int = 192, bias: bool = False) -> LayerParts:
    """In bfloat16. `qkv` has two blocks of outputs and half of one."""
    shapes = (SHAPES[0], SHAPES[1], (2 * intermediate, HIDDEN), (HIDDEN, intermediate))
    qkv, output, gate_up, down = (
        pack_linear((torch.randn(shape) * shape[1] ** -0.5).bfloat16(), torch.randn(shape[0]).bfloat16() if bias else None)
        for shape in shapes
    )
    norms = {"input_norm": 0.5 + torch.rand(HIDDEN), "mlp_norm": 0.5 + torch.rand(HIDDEN)}
    return LayerParts(qkv=qkv, output=output, gate_up=gate_up, down=down, window=None, **norms)


def decoder(layers: list[LayerParts]) -> DecodeLayers:
    cpu.compiling().join()
    return DecodeLayers(layers, NORM, COS_SIN, eps=EPS, scale=0.3, **SIZES)


def batch_of(contexts: list[int]) -> PagedBatch:
    blocks = iter(torch.randperm(sum(-(-context // BLOCK_SIZE) for context in contexts)).tolist())
    tables = [[next(blocks) for _ in range(-(-context // BLOCK_SIZE))] for context in contexts]
    starts = [context - 1 for context in contexts]
    return PagedBatch.build(starts, [1] * len(contexts), tables, block_size=BLOCK_SIZE, device="cpu")


def caches(layers: int) -> list[Tensor]:
    return [torch.randn(64, 2, KV_HEADS, BLOCK_SIZE, HEAD_DIM).bfloat16() for _ in range(layers)]


def by_ops(layers: list[LayerParts], embedded: Tensor, batch: PagedBatch, held: list[Tensor]) -> Tensor:
    residual, added = embedded.clone(), torch.zeros_like(embedded).bfloat16()
    for each, cache in zip(layers, held, strict=True):
        normed = add_rms_norm(added, residual, each.input_norm, EPS)
        q = rope_kv_write(each.qkv(normed), batch.positions, COS_SIN, cache, batch.slot_mapping, **SIZES)
        attended = paged_attention(q, cache, batch, scale=0.3, window=each.window)
        normed = add_rms_norm(each.output(attended), residual, each.mlp_norm, EPS)
        added = each.down(silu_mul(each.gate_up(normed)))
    return add_rms_norm(added, residual, NORM, EPS)


@pytest.mark.parametrize("contexts", [[1], [30], [17, 1, 30], [5] * 7, [2] * 13])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [layer(4, 32), layer(4, 32)],
        lambda: [layer(8, None, bias=True), layer(4, 16, window=3), layer(8, 32)],
        lambda: [wide_layer(), wide_layer(bias=True)],
        lambda: [wide_layer(intermediate=2304)],
        lambda: [layer(4, 16), replace(layer(4, 32), down=wide_layer(intermediate=INTERMEDIATE).down)],
    ],
    ids=["4 bits", "mixed", "bfloat16", "bfloat16, long rows", "bfloat16 and 4 bits"],
)
def test_is_what_the_ops_make(make: Callable[[], list[LayerParts]], threads: int, contexts: list[int]) -> None:
    torch.set_num_threads(threads)
    layers = make()
    assert can_decode(layers)
    op, batch, held = decoder(layers), batch_of(contexts), caches(len(layers))
    expected_held = [cache.clone() for cache in held]
    embedded = torch.randn(len(contexts), HIDDEN)
    expected = by_ops(layers, embedded, batch, expected_held)

    assert op.takes(batch, batch.positions, held)
    for _ in range(3):  # addresses are kept from step to step
        actual = op(embedded, batch, batch.positions, held)

        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    for cache, expected_cache in zip(held, expected_held, strict=True):
        torch.testing.assert_close(cache, expected_cache, rtol=2e-2, atol=2e-2)


def test_finds_caches_that_are_new() -> None:
    layers, batch, embedded = [layer(4, 32)], batch_of([9]), torch.randn(1, HIDDEN)
    op, first, second = decoder(layers), caches(1), caches(1)

    op(embedded, batch, batch.positions, first)

    expected = by_ops(layers, embedded, batch, [each.clone() for each in second])
    torch.testing.assert_close(op(embedded, batch, batch.positions, second), expected, rtol=2e-2, atol=2e-2)


def test_steps_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    op, held, one = decoder([layer(4, 32)]), caches(1), batch_of([9])
    prefill = PagedBatch.build([0], [3], [[0]], block_size=BLOCK_SIZE, device="cpu")
    many = batch_of([1] * (cpu.MAX_ROWS + 1))
    assert decoder([wide_layer()]).takes(many, many.positions, held)

    assert op.takes(one, one.positions, held)
    assert not op.takes(prefill, prefill.positions, held)
    assert not op.takes(many, many.positions, held)
    assert not op.takes(one, one.positions.expand(3, 1), held)
    assert not op.takes(one, one.positions, [held[0].to(torch.int8)])
    monkeypatch.setattr(op._compiling, "loop", None)
    assert not op.takes(one, one.positions, held)
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "deterministic", True)
    assert not op.takes(one, one.positions, held)


def test_a_copy_in_16_bits_takes_more_rows() -> None:
    down = pack_quantized(random_weight(HIDDEN, INTERMEDIATE, bits=4, group_size=32), dtype=torch.bfloat16, wide_copy=True)
    whole = layer(4, 32)
    parts = {name: getattr(whole, name) for name in ("input_norm", "qkv", "output", "mlp_norm", "gate_up", "window")}
    op, held = decoder([LayerParts(down=down, **parts)]), caches(1)

    most = down.narrow.most_rows_beside_copy
    for rows in (most, most + 1):
        batch = batch_of([1] * rows)
        assert op.takes(batch, batch.positions, held) == (rows == most)


def test_weights_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    good, down = layer(4, 32), wide_layer(intermediate=INTERMEDIATE).down
    plain = pack_linear(torch.randn(HIDDEN, INTERMEDIATE))
    ordered = pack_quantized(random_weight(HIDDEN, INTERMEDIATE, ordered=True), dtype=torch.bfloat16)

    assert can_decode([good])
    assert can_decode([wide_layer(), replace(good, down=down)])
    assert not can_decode([good, replace(good, down=plain)])
    assert not can_decode([good, replace(good, down=ordered)])
    assert not can_decode([wide_layer(intermediate=INTERMEDIATE)])  # a block of gates would end in the middle of one
    monkeypatch.setattr(dispatch, "deterministic", True)
    assert not can_decode([wide_layer()])
    monkeypatch.setattr(dispatch, "deterministic", False)
    monkeypatch.setattr(linear_cpu, "_in_blocks", lambda outputs, inputs: (outputs, inputs) != SHAPES[1])
    assert not can_decode([wide_layer()])
    monkeypatch.undo()
    monkeypatch.setattr(cpu_tiles, "_loop", lambda: None)  # another processor
    assert not can_decode([wide_layer()])
    monkeypatch.undo()
    monkeypatch.setattr(loops, "enabled", False)
    assert not can_decode([layer(4, 32)])
    assert not can_decode([wide_layer()])


def test_sums_in_bfloat16_are_the_same_in_any_company() -> None:
    op, embedded = decoder([wide_layer(), wide_layer(bias=True)]), torch.randn(13, HIDDEN)
    held = caches(2)
    batch = batch_of([3] * 13)
    whole = op(embedded, batch, batch.positions, [each.clone() for each in held])

    for start, count in ((0, 1), (5, 2), (6, 7), (1, 12)):
        some = slice(start, start + count)
        part = PagedBatch.build(
            [2] * count, [1] * count, batch.block_tables[some].tolist(), block_size=BLOCK_SIZE, device="cpu"
        )
        assert torch.equal(op(embedded[some], part, part.positions, [each.clone() for each in held]), whole[some])


@pytest.mark.parametrize("what", ["position", "slot", "block"])
def test_stays_in_its_tables(what: str) -> None:
    op, held, batch = decoder([layer(4, 32)]), caches(1), batch_of([9, 9])
    positions = torch.tensor([3, 50]) if what == "position" else batch.positions
    if what == "slot":
        batch.slot_mapping[1] = 64 * BLOCK_SIZE
    if what == "block":
        batch.block_tables[1, 2] = 64

    with pytest.raises(IndexError, match="sequence 1"):
        op(torch.randn(2, HIDDEN), batch, positions, held)


def test_allocates_nothing_in_its_threads() -> None:
    """One that failed to would leave the others waiting for it."""
    from numba.core.runtime import _nrt_python as runtime
    from numba.core.runtime import rtsys

    op, held, batch = decoder([layer(4, 32, bias=True), layer(8, None)]), caches(2), batch_of([9, 30])
    counted = runtime.memsys_stats_enabled()
    runtime.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        op(torch.randn(2, HIDDEN), batch, batch.positions, held)

        assert rtsys.get_allocation_stats() == before
    finally:
        if not counted:
            runtime.memsys_disable_stats()
