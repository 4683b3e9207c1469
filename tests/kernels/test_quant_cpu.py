"""Layers over quantised weights on CPU that need no loops; `test_quant_cpu_tiles.py` has the others."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import torch
from torch import Tensor

from dashinfer_kernels import QuantizedWeight, loops, pack_quantized, quantize_float8
from dashinfer_kernels.linear.cpu import PackedLinear, packed_dtype
from dashinfer_kernels.quant_matmul import cpu, cpu_blocks
from dashinfer_kernels.quant_matmul.cpu import BesideCopy, IntegerLinear, NibbleLinear, RoundedInputs, RowLinear
from dashinfer_kernels.quant_matmul.cpu_blocks import BlockLinear
from dashinfer_kernels.quant_matmul.reference import quantized_linear
from dashinfer_kernels.quant_matmul.weight import FLOAT8

needs_kernels = pytest.mark.skipif(not cpu._kernel_tile(), reason="the 4-bit kernel has no layout known here on this processor")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
ROWS = (0, 1, 3, 17, 130)


@pytest.fixture(autouse=True)
def _without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fits", lambda weight, dtype: False)


def random_weight(
    outputs: int, inputs: int, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True, ordered: bool = False
) -> QuantizedWeight:
    size = group_size or inputs
    shape, most = (outputs, -(-inputs // size)), 2**bits
    codes = torch.randint(0, most, (outputs, inputs), dtype=torch.uint8)
    scales = (0.5 + torch.rand(shape)) * inputs**-0.5 * 3 / most
    return QuantizedWeight(
        codes=(codes - most // 2).view(torch.int8) if symmetric else codes,
        scales=scales,
        offsets=None if symmetric else scales * (torch.rand(shape) - most / 2),
        bits=bits,
        group_size=size,
        order=torch.randperm(inputs) if ordered else None,
    )


def blocks_of_float8(outputs: int, inputs: int) -> QuantizedWeight:
    codes = torch.randn(outputs, inputs).mul_(100).clamp_(-448, 448).to(FLOAT8)
    scales = (0.5 + torch.rand(-(-outputs // 128), -(-inputs // 128))) * inputs**-0.5 / 100
    return QuantizedWeight(codes=codes, scales=scales, group_size=128, block_rows=128)


@pytest.mark.parametrize("offset", [1, 8, 20])
def test_codes_may_lie_anywhere(offset: int) -> None:
    weight = random_weight(32, 64)
    memory = torch.empty(weight.codes.numel() + 64, dtype=torch.int8)
    codes = memory[offset : offset + weight.codes.numel()].view(32, 64).copy_(weight.codes)
    x = torch.randn(2, 64).bfloat16()

    layer = pack_quantized(replace(weight, codes=codes), dtype=torch.bfloat16)

    assert isinstance(layer, RowLinear)
    assert torch.equal(layer(x), pack_quantized(weight, dtype=torch.bfloat16)(x))


# A weight, and the layer that serves it in bfloat16.
WEIGHTS: dict[str, tuple[Callable[[], QuantizedWeight], type]] = {
    "4 bits, 32": (lambda: random_weight(160, 96, bits=4, group_size=32, symmetric=False), NibbleLinear),
    "4 bits, 128, signed, ordered": (
        lambda: random_weight(70, 512, bits=4, group_size=128, ordered=True),
        NibbleLinear,
    ),
    "4 bits, 96": (lambda: random_weight(64, 192, bits=4, group_size=96, symmetric=False), NibbleLinear),
    "4 bits, whole rows": (lambda: random_weight(64, 576, bits=4), NibbleLinear),
    "3 bits": (lambda: random_weight(64, 256, bits=3, group_size=64, symmetric=False), NibbleLinear),
    "2 bits, signed": (lambda: random_weight(64, 256, bits=2, group_size=64), NibbleLinear),
    "8 bits, 32": (lambda: random_weight(200, 1536, group_size=32), NibbleLinear),
    "8 bits, 128, offsets": (lambda: random_weight(70, 256, group_size=128, symmetric=False), NibbleLinear),
    "8 bits, whole rows, offsets, ordered": (
        lambda: random_weight(64, 96, symmetric=False, ordered=True),
        NibbleLinear,
    ),
    "8 bits, whole rows": (lambda: random_weight(131, 576), RowLinear),
    "8 bits, whole rows, ordered": (lambda: random_weight(13, 16, ordered=True), RowLinear),
    "8 bits, whole rows, 100 inputs": (lambda: random_weight(13, 100), BlockLinear),
    "8 bits, 16": (lambda: random_weight(300, 4096, group_size=16), BlockLinear),
    "8 bits, 16, offsets, ordered": (
        lambda: random_weight(30, 64, group_size=16, symmetric=False, ordered=True),
        BlockLinear,
    ),
    "4 bits, 16": (lambda: random_weight(130, 4096, bits=4, group_size=16, symmetric=False), BlockLinear),
    "4 bits, the last group shorter": (lambda: random_weight(40, 200, bits=4, group_size=64, symmetric=False), BlockLinear),
    "float8": (lambda: quantize_float8(torch.randn(150, 2000) * 2000**-0.5), BlockLinear),
    "float8, blocks": (lambda: blocks_of_float8(200, 4180), BlockLinear),
}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", WEIGHTS)
def test_matches_float64_at_any_number_of_rows(name: str, dtype: torch.dtype) -> None:
    make, expected_type = WEIGHTS[name]
    weight = make()
    bias = torch.randn(weight.out_features).to(dtype)
    layer = pack_quantized(weight, bias, dtype=dtype)

    assert type(layer) is (BlockLinear if dtype == torch.float32 else expected_type)
    for rows in ROWS:
        x = torch.randn(rows, weight.in_features).to(dtype)
        actual = layer(x)

        assert actual.shape == (rows, weight.out_features)
        assert actual.dtype == dtype
        expected = quantized_linear(x.double(), weight, bias.double())
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        torch.testing.assert_close(layer.wide(x), actual.float())


@pytest.fixture(params=["kernel", "loops", "blocks"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of a layer's paths is taken, at any number of rows."""
    most = 2**40 if request.param == "kernel" else 0
    monkeypatch.setattr(cpu, "NIBBLE_ROWS", {1: most, 2: most})
    monkeypatch.setattr(cpu, "NIBBLE_ROWS_WITH_LOOPS", most)
    monkeypatch.setattr(RowLinear, "most_rows", most)
    if request.param == "blocks":
        monkeypatch.setattr(loops, "enabled", False)
    return request.param


@needs_kernels
@pytest.mark.parametrize("name", [name for name in WEIGHTS if "float8" not in name])
def test_weights_are_those_of_the_definition_rounded_to_bfloat16(name: str, path: str) -> None:
    weight = WEIGHTS[name][0]()
    layer = pack_quantized(weight, dtype=torch.bfloat16)

    actual = layer(torch.eye(weight.in_features).bfloat16()).T.double()

    expected = weight.dequantize().double()
    # Scale, offset, product and sum are rounded, each by 2**-9 of itself at most; an offset may be as large as the values.
    bound = 2**-8 * expected.abs() + 1.5 * 2**-8 * expected.abs().amax(-1, keepdim=True)
    assert ((actual - expected).abs() <= bound).all()


def test_every_float8_number_is_converted_exactly() -> None:
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    codes = codes[codes.view(FLOAT8).float().isfinite()].view(FLOAT8).view(1, -1)
    weight = QuantizedWeight(codes=codes, scales=torch.ones(1, 1), group_size=codes.shape[1])
    layer = pack_quantized(weight, dtype=torch.bfloat16)

    assert torch.equal(layer(torch.eye(codes.shape[1]).bfloat16()).T.float(), codes.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_activations(dtype: torch.dtype) -> None:
    for weight in (random_weight(131, 576), random_weight(64, 256, group_size=64, symmetric=False)):
        bias = torch.randn(weight.out_features).to(dtype)
        layer = pack_quantized(weight, bias, dtype=dtype, activations="int8")
        exact = isinstance(layer, IntegerLinear)

        assert exact or isinstance(layer, RoundedInputs)
        for rows in ROWS:
            x = torch.randn(rows, weight.in_features).to(dtype)
            expected = quantized_linear(x, weight, bias, "int8")
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype] if exact else TOLERANCE[dtype]
            torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)


def test_processors_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_kernel_tile", lambda: None)
    monkeypatch.setattr(cpu, "_multiplies_integers", lambda: False)
    monkeypatch.setattr(cpu, "packed_dtype", lambda dtype: torch.float32)
    monkeypatch.setattr(cpu_blocks, "packed_dtype", lambda dtype: torch.float32)
    x = torch.randn(20, 96).bfloat16()

    for weight in (random_weight(70, 96, bits=4, group_size=32, symmetric=False), random_weight(70, 96)):
        for activations in (None, "int8"):
            layer = pack_quantized(weight, dtype=torch.bfloat16, activations=activations)
            expected = quantized_linear(x, weight, None, activations)
            torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)


@needs_kernels
@pytest.mark.skipif(not loops.enabled, reason="needs Numba")
@pytest.mark.skipif(packed_dtype(torch.bfloat16) != torch.bfloat16, reason="bfloat16 is not multiplied here")
@pytest.mark.parametrize("shape", [(100, 128), (700, 576)])
def test_codes_unpacked_in_a_loop_give_the_same(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(*shape, bits=4, group_size=32, symmetric=False)
    layer = pack_quantized(weight, dtype=torch.bfloat16)
    x = torch.randn(cpu.NIBBLE_ROWS_WITH_LOOPS + 1, shape[1]).bfloat16()
    called, loop = [], cpu._loop()
    monkeypatch.setattr(cpu, "_loop", lambda: called.append(1) or loop)

    with_loop = layer(x)
    assert called
    monkeypatch.setattr(loops, "enabled", False)

    torch.testing.assert_close(with_loop, layer._many(x), rtol=1e-2, atol=1e-2)


@needs_kernels
@pytest.mark.parametrize("tile", [64, 32])
def test_kernels_tiles_are_split_as_they_are_packed(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of another processor, whose kernel cannot run here."""
    monkeypatch.setattr(cpu, "_kernel_tile", lambda: tile)
    monkeypatch.setattr(cpu, "NIBBLE_ROWS", {1: 0, 2: 0})
    x = torch.randn(20, 128).bfloat16()

    for bits in (4, 8):
        weight = random_weight(100, 128, bits=bits, group_size=32, symmetric=False)
        layer = pack_quantized(weight, dtype=torch.bfloat16)
        torch.testing.assert_close(layer(x), quantized_linear(x, weight, None), rtol=2e-2, atol=2e-2)


def test_takes_rows_anywhere_in_memory() -> None:
    flat = torch.randn(512).bfloat16()
    for bits in (4, 8):
        weight = random_weight(64, 64, bits=bits)
        layer = pack_quantized(weight, dtype=torch.bfloat16)
        for x in (flat[1:193].view(3, 64), flat[:384].view(3, 128)[:, ::2]):
            torch.testing.assert_close(layer(x), quantized_linear(x, weight, None), rtol=2e-2, atol=2e-2)
        assert layer(flat[:128].view(2, 1, 64)).shape == (2, 1, 64)


# -- memory


@needs_kernels
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "bytes_a_group"),
    [(4, 32, False, 16 + 4), (4, 128, False, 64 + 4), (8, 128, True, 128 + 8), (8, 32, True, 32 + 8), (8, 16, True, 16 + 2)],
)
def test_knows_its_size(bits: int, group_size: int, symmetric: bool, bytes_a_group: int) -> None:
    weight = random_weight(128, 256, bits=bits, group_size=group_size, symmetric=symmetric)

    assert pack_quantized(weight, dtype=torch.bfloat16).nbytes == weight.codes.numel() // group_size * bytes_a_group
    copied = pack_quantized(weight, dtype=torch.bfloat16, wide_copy=True)
    narrow = bytes_a_group * 256 // group_size * 128 if group_size > 16 else 0
    assert copied.nbytes == narrow + (packed_dtype(torch.bfloat16) or torch.bfloat16).itemsize * 128 * 256


def resident() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@needs_kernels
@pytest.mark.parametrize("form", ["4 bits", "8 bits", "8 bits, groups", "int8 activations", "float8", "groups of 16"])
def test_only_the_packed_weights_stay_in_memory(form: str) -> None:
    outputs, inputs = 8192, 4096
    x = torch.randn(1, inputs).bfloat16()
    many = torch.randn(64, inputs).bfloat16()
    pack_quantized(random_weight(64, 64), dtype=torch.bfloat16, activations="int8")(x[:, :64])
    before = resident()

    weight = {
        "4 bits": lambda: random_weight(outputs, inputs, bits=4, group_size=128, symmetric=False),
        "8 bits, groups": lambda: random_weight(outputs, inputs, group_size=128),
        "float8": lambda: QuantizedWeight(
            codes=torch.zeros(outputs, inputs, dtype=FLOAT8), scales=torch.ones(outputs, 1), group_size=inputs
        ),
        "groups of 16": lambda: random_weight(outputs, inputs, bits=4, group_size=16),
    }.get(form, lambda: random_weight(outputs, inputs))()
    layer = pack_quantized(weight, dtype=torch.bfloat16, activations="int8" if form == "int8 activations" else None)
    del weight
    for rows in (x, many):
        layer(rows)

    grown = resident() - before
    assert layer.nbytes <= 1.26 * outputs * inputs * (0.5 if form in ("4 bits", "groups of 16") else 1)
    assert grown <= 1.05 * layer.nbytes + 2**20


# -- a copy in 16 bits beside


@needs_kernels
def test_a_wide_copy_serves_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(64, 96, bits=4, group_size=32, symmetric=False)
    layer = pack_quantized(weight, dtype=torch.bfloat16, wide_copy=True)
    assert isinstance(layer, BesideCopy)
    served = []
    monkeypatch.setattr(NibbleLinear, "__call__", recorder(served, NibbleLinear.__call__))
    monkeypatch.setattr(PackedLinear, "__call__", recorder(served, PackedLinear.__call__))

    for rows in (1, 8, 9, 60):
        x = torch.randn(rows, 96).bfloat16()
        torch.testing.assert_close(layer(x), quantized_linear(x, weight, None), rtol=2e-2, atol=2e-2)

    assert served == [NibbleLinear, NibbleLinear, PackedLinear, PackedLinear]
    assert isinstance(pack_quantized(random_weight(8, 32, group_size=16), dtype=torch.bfloat16, wide_copy=True), PackedLinear)


def recorder(record: list[type], call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def recorded(self, x: Tensor) -> Tensor:
        record.append(type(self))
        return call(self, x)

    return recorded
