"""Layers over weights of few bits with unquantised activations, in Triton, against the definition in float64."""

import gc
import re
import weakref
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import QuantizedWeight, dispatch, pack_quantized, quantize_int, tuning
from dashinfer_kernels.quant_matmul import reference, weight_only
from dashinfer_kernels.quant_matmul.launch import UnpackedLinear
from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES
from dashinfer_kernels.quant_matmul.weight_only import WeightOnlyLinear, choose_config, pack_words

pytestmark = pytest.mark.feature("Quantisation", "Weights of 8 or 4 bits")

SMALL = {"BLOCK_ROWS": 16, "BLOCK_OUT": 64, "BLOCK_WORDS": 64, "GROUP_ROWS": 2, "SPLITS": 1, "SCALE": "sums"}
SMALL |= {"num_warps": 4, "num_stages": 2, "UNPACK": False}
SHAPE = (70, 400)  # outputs and inputs of which neither fills a tile


def make(kind: str, group_size: int | None, shape: tuple[int, int] = SHAPE) -> QuantizedWeight:
    """A matrix whose every code occurs. "u4": with offsets; "z4": with whole zeros."""
    outputs, inputs = shape
    size = group_size or inputs
    groups = (outputs, -(-inputs // size))
    scales = (0.02 + 0.02 * torch.rand(groups)).half().float()
    if kind == "f8":
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        return QuantizedWeight(codes=codes.view(FLOAT8), scales=scales / 64, group_size=size)
    bits = int(kind[1:])
    if kind[0] == "s":
        least, most = RANGES[bits]
        codes = torch.randint(least, most + 1, shape, dtype=torch.int8)
        return QuantizedWeight(codes=codes, scales=scales / 2**bits, bits=bits, group_size=size)
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits + 1, groups).float() if kind[0] == "z" else 2**bits * torch.rand(groups)
    scales /= 2**bits
    return QuantizedWeight(codes=codes, scales=scales, offsets=-zeros * scales, bits=bits, group_size=size)


def check(layer: WeightOnlyLinear, weight: QuantizedWeight, x: Tensor, bias: Tensor | None, tolerance: float = 2e-3) -> None:
    actual = layer(x)

    assert actual.shape == (len(x), weight.out_features)
    assert actual.dtype == x.dtype
    expected = reference.quantized_linear(x.double(), weight, bias)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    wide = layer.wide(x)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Launch parameters that every layer takes."""
    config = dict(SMALL)
    monkeypatch.setattr(tuning, "lookup", lambda op, key: config)
    return config


SUMS: list[tuple[str, int | None]]
SUMS = [("s4", 128), ("s4", 32), ("s4", 16), ("s4", None), ("z4", 64), ("z4", None), ("s3", 32), ("s8", None), ("f8", 128)]
WEIGHTS: list[tuple[str, int | None]]
WEIGHTS = [("s4", 16), ("z4", 128), ("u4", 128), ("u4", 48), ("u4", None), ("u2", 32), ("s8", 16), ("u8", 128), ("f8", None)]


@pytest.mark.parametrize(
    ("kind", "group_size", "scale"), [*((*each, "sums") for each in SUMS), *((*each, "weights") for each in WEIGHTS)]
)
def test_matches_the_definition(
    triton_path: str, forced: dict[str, Any], kind: str, group_size: int | None, scale: str
) -> None:
    weight = move(make(kind, group_size), triton_path)
    forced |= {"SCALE": scale, "BLOCK_WORDS": 32 if scale == "weights" else 64}
    dtype = torch.float32 if scale == "weights" and kind[1] != "4" else torch.float16
    tolerance = 4e-3 if dtype == torch.float16 else 1e-4
    bias = torch.randn(SHAPE[0]).to(dtype).to(triton_path)
    layer = WeightOnlyLinear(weight, bias, dtype)

    assert layer.offsets == {"u": "offsets", "z": "zeros"}.get(kind[0], "none")
    check(layer, weight, (0.5 * torch.randn(3, SHAPE[1])).to(dtype).to(triton_path), bias, tolerance)
    unpacked = layer.unpack(3, SHAPE[0])
    torch.testing.assert_close(unpacked, weight.dequantize(dtype)[3:], rtol=tolerance, atol=tolerance)


def move(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    names = ("codes", "scales", "offsets", "order")
    return replace(weight, **{name: None if (t := getattr(weight, name)) is None else t.to(device) for name in names})


# -- shapes, forms and modes


@pytest.mark.parametrize(("kind", "scale"), [("z4", "sums"), ("z4", "weights"), ("u4", "weights")])
def test_a_quarter_of_the_words_at_a_time(triton_path: str, forced: dict[str, Any], kind: str, scale: str) -> None:
    forced |= {"BLOCK_WORDS": 16, "SCALE": scale}
    weight = move(make(kind, 128), triton_path)

    x = (0.5 * torch.randn(3, SHAPE[1])).half().to(triton_path)
    check(WeightOnlyLinear(weight, None, torch.float16), weight, x, None, 4e-3)


@pytest.mark.parametrize("rows", [1, 17, 65, 130])
def test_chosen_forms_match_the_definition(triton_path: str, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(weight_only, "UNPACKED_ROWS", 100)
    monkeypatch.setattr(weight_only, "UNPACKED_BYTES", 60_000)  # a piece and a bit
    weight = move(make("z4", 128, (200, 272)), triton_path)
    for bias in (None, torch.randn(200).half().to(triton_path)):
        layer = pack_quantized(weight, bias, dtype=torch.float16)

        assert isinstance(layer, WeightOnlyLinear)
        check(layer, weight, (0.5 * torch.randn(rows, 272)).half().to(triton_path), bias, 4e-3)


def test_float32_and_leading_dimensions_and_gaps(triton_path: str) -> None:
    weight = move(make("u8", 32), triton_path)
    layer = WeightOnlyLinear(weight, None, torch.float32)
    x = torch.randn(2, 3, 2 * SHAPE[1], device=triton_path)[..., ::2]

    expected = reference.quantized_linear(x.reshape(6, -1).double(), weight, None).view(2, 3, -1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert layer(x[:0]).shape == (0, 3, SHAPE[0])


def test_columns_in_another_order(triton_path: str) -> None:
    weight = replace(make("z4", 64), order=torch.randperm(SHAPE[1]))
    weight = move(weight, triton_path)

    check(WeightOnlyLinear(weight, None, torch.float16), weight, torch.randn(2, SHAPE[1]).half().to(triton_path), None, 2e-2)


@pytest.mark.parametrize("rows", [2, 70])
def test_blocks_share_scales(triton_path: str, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(weight_only, "UNPACKED_ROWS", 70)
    weight = make("f8", 128, (200, 300))
    weight = move(replace(weight, scales=weight.scales[::128].contiguous(), block_rows=128), triton_path)

    check(WeightOnlyLinear(weight, None, torch.float16), weight, torch.randn(rows, 300).half().to(triton_path), None, 2e-2)


@pytest.mark.parametrize("kind", ["s4", "s8", "u4"])
def test_split_sums_have_the_same_bits_in_one_program(triton_path: str, forced: dict[str, Any], kind: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    forced |= {"SPLITS": 3, "BLOCK_WORDS": 32, "SCALE": "weights" if kind == "u4" else "sums"}
    weight = move(make(kind, 64, (70, 1100)), triton_path)
    layer = WeightOnlyLinear(weight, None, torch.float16)
    x = torch.randn(5, 1100).half().to(triton_path)
    monkeypatch.setattr(weight_only, "_multiprocessors", lambda device: 1000)
    shared = layer(x)

    assert torch.equal(layer(x), shared)
    _, arrivals = weight_only._workspace(x.device).take(1, 1)
    assert not arrivals.any()
    monkeypatch.setattr(weight_only, "_multiprocessors", lambda device: 1)
    assert torch.equal(layer(x), shared)
    torch.testing.assert_close(shared.double(), reference.quantized_linear(x.double(), weight, None), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("kind", "group_size"), [("u4", 128), ("s8", None)])
def test_deterministic_rows_have_the_same_bits_in_any_company(
    triton_path: str, monkeypatch: pytest.MonkeyPatch, kind: str, group_size: int | None
) -> None:
    monkeypatch.setattr(dispatch, "deterministic", True)
    monkeypatch.setattr(weight_only, "_multiprocessors", lambda device: 2)
    monkeypatch.setattr(weight_only, "LEAST_STEPS", 1)
    weight = move(make(kind, group_size, (70, 768)), triton_path)
    layer = WeightOnlyLinear(weight, None, torch.float16)
    x = torch.randn(130, 768).half().to(triton_path)
    whole = layer(x)

    assert layer.config(1) == layer.config(5000)
    assert layer.config(1)["SPLITS"] > 1
    torch.testing.assert_close(whole.double(), reference.quantized_linear(x.double(), weight, None), rtol=2e-2, atol=2e-2)
    for start, rows in ((0, 1), (5, 1), (129, 1), (60, 20)):
        assert torch.equal(layer(x[start : start + rows]), whole[start : start + rows])


# -- layout and memory


def test_words_hold_a_code_of_each_run() -> None:
    codes = torch.arange(2 * 160).remainder(16).to(torch.uint8).view(2, 160)
    words = pack_words(codes, 4, 32, 2, 64)

    assert words.shape == (2, 64, 32)
    for output, column in product(range(2), range(160)):
        step, place, word = column // 128, column % 128 // 32, column % 32
        assert int(words[step, output, word]) >> 4 * place & 15 == codes[output, column]
    assert not words[:, 2:].any()
    bytes_ = pack_words(torch.full((1, 128), 255, dtype=torch.uint8), 2, 64, 1, 64)
    assert (bytes_[0, 0] == -1).all()


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "whole_zeros", "expected"),
    [
        (4, 128, False, True, 4 + (16 + 8) / 128),
        (4, 32, False, False, 4 + (16 + 16) / 32),
        (4, 32, True, None, 4 + 16 / 32),
        (8, None, True, None, 8 + 16 / 4096),
    ],
)
def test_resident_memory_is_the_packed_size(
    triton_path: str, bits: int, group_size: int | None, symmetric: bool, whole_zeros: bool | None, expected: float
) -> None:
    outputs, inputs = 192, 4096
    form = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "whole_zeros": whole_zeros}
    weight = quantize_int(torch.randn(outputs, inputs), **form)
    codes = weakref.ref(weight.codes)
    layer = pack_quantized(move(weight, triton_path), dtype=torch.float16)
    layer(torch.randn(2, inputs).half().to(triton_path))
    del weight
    gc.collect()

    assert codes() is None
    held = {id(each): each.nbytes for each in vars(layer).values() if isinstance(each, Tensor)}
    assert sum(held.values()) == layer.nbytes
    packed = outputs * inputs * expected / 8
    assert packed <= layer.nbytes <= 1.05 * packed


def test_what_cannot_be_packed_stays_as_it_is(triton_path: str) -> None:
    weight = move(make("s8", 24), triton_path)

    assert isinstance(pack_quantized(weight, dtype=torch.float16), UnpackedLinear)


def test_what_is_unpacked_in_every_call_is_deterministic_too(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pack_quantized(move(make("s8", 24), triton_path), dtype=torch.float16)
    x = torch.randn(5, layer.in_features).half().to(triton_path)
    expected = layer.wide(x)
    monkeypatch.setattr(dispatch, "deterministic", True)
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # the library's product is not taken

    torch.testing.assert_close(layer.wide(x), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(layer(x)[1:2], layer(x[1:2]))


@pytest.mark.parametrize(("step", "offsets"), [(1.0, "zeros"), (0.9995, "zeros"), (0.9, "offsets")])
def test_offsets_that_are_whole_steps_become_zeros(step: float, offsets: str) -> None:
    weight = make("z4", 128)
    weight = replace(weight, offsets=weight.offsets * step - (0 if step > 0.9 else 1e-4))

    assert WeightOnlyLinear(weight, None, torch.float16).offsets == offsets


# -- launch parameters


def choose(rows: int | None, out_features: int, in_features: int, **options: Any) -> dict[str, Any] | None:
    defaults = {"wide": False, "shifted": False, "multiprocessors": 132, "generation": "hopper"}
    return choose_config(rows, out_features, in_features // 256, **(defaults | options))


@pytest.mark.parametrize("shape", [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (10240, 8192), (59136, 8192)])
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_few_rows_occupy_every_multiprocessor_in_one_wave(rows: int, shape: tuple[int, int]) -> None:
    config = choose(rows, *shape)

    assert config is not None
    programs = -(-shape[0] // config["BLOCK_OUT"]) * config["SPLITS"]
    assert programs >= 132
    assert config["SPLITS"] == 1 or programs <= 2 * 132
    assert shape[1] // 256 // config["SPLITS"] >= 3


def test_forms_follow_the_number_of_rows() -> None:
    assert choose(64, 4096, 4096)["SCALE"] == "sums"
    assert choose(65, 4096, 4096)["SCALE"] == "weights"
    assert choose(weight_only.UNPACKED_ROWS, 4096, 4096) is None
    assert choose(None, 4096, 4096)["BLOCK_ROWS"] == 64


@pytest.mark.parametrize("generation", ["ampere", "ada"])
def test_what_shifts_codes_halves_large_tiles_where_registers_are_short(generation: str) -> None:
    def words(rows: int | None, **options: Any) -> int:
        return choose(rows, 4096, 4096, generation=generation, **options)["BLOCK_WORDS"]

    assert [words(rows) for rows in (32, 64, 128, None)] == [64, 64, 32, 64]
    assert [words(rows, shifted=True) for rows in (32, 64, 128, None)] == [64, 32, 16, 32]
    assert words(128, shifted=True, wide=True) == 32


# -- the PTX that GPUs of NVIDIA run in place of what the interpreter ran above


def evaluate(ptx: str, operands: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The 32-bit result of a conversion's PTX, instruction by instruction. Values: int64 that hold 32 bits."""

    def halves(x: Tensor) -> Tensor:
        return torch.stack((x & 0xFFFF, x >> 16)).view(2, -1).to(torch.int32).to(torch.int16).view(dtype).double()

    registers = dict(operands)
    for line in re.findall(r"^([a-z].*);$", ptx, re.MULTILINE):
        name, *arguments = line.replace(",", "").split()
        values = [registers[each] if each in registers else torch.tensor(int(each, 0)) for each in arguments[1:4]]
        a, b, c = [*values, None, None][:3]
        if name == "mov.b32":
            result = a
        elif name in ("shl.b32", "shr.b32"):
            result = (a << b if name == "shl.b32" else a >> b) & 0xFFFFFFFF
        elif name == "and.b32":
            result = a & b
        elif name == "lop3.b32":
            result = {"0xea": (a & b) | c, "0x6a": (a & b) ^ c}[arguments[4]]
        else:
            assert name == ("fma.rn.f16x2" if dtype == torch.float16 else "fma.rn.bf16x2")
            bits = (halves(a) * halves(b) + halves(c)).to(dtype).view(torch.int16).long() & 0xFFFF
            result = bits[0] | bits[1] << 16
        registers[arguments[0]] = result
    return halves(registers["$0"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int4", "int8", "float8"])
def test_ptx_converts_every_word(kind: str, dtype: torch.dtype) -> None:
    kernel = pytest.importorskip("dashinfer_kernels.quant_matmul.kernel_weight_only")
    words = torch.arange(1 << 16)
    if kind == "float8":
        words = words[((words & 0x7F) != 0x7F) & ((words >> 8 & 0x7F) != 0x7F)]
    pairs = words | words.roll(1) << 16

    def pair(value: float) -> Tensor:
        bits = int(torch.tensor(value).to(dtype).view(torch.int16)) & 0xFFFF
        return torch.tensor(bits | bits << 16)

    for place, zeros in product(range(4 if kind == "int4" else 2), (False, True) if kind == "int4" else (False,)):
        if kind == "float8":
            exact = (words >> 8 * place & 0xFF).to(torch.uint8).view(FLOAT8).double()
        elif kind == "int8":
            exact = (words >> 8 * place & 0xFF).double() - 128
        else:
            exact = (words >> 4 * place & 0xF).double() - (5 if zeros else 8)
        operands = {"$1": pairs}
        if zeros:
            operands["$2"] = pair(-(1024 if dtype == torch.float16 else 128) - 5.0)
        plain = evaluate(kernel.conversion(kind, dtype == torch.float16, place, zeros, False, False), operands, dtype)
        assert torch.equal(plain, torch.stack((exact, exact.roll(1))))
        factor = {("float8", torch.float16): 256.0, ("float8", torch.bfloat16): 2.0**120}.get((kind, dtype), 1.0) * 0.5
        for offset in (False, True) if not zeros else (False,):
            operands |= {"$3" if zeros else "$2": pair(factor), **({"$3": pair(3.0)} if offset else {})}
            scaled = evaluate(kernel.conversion(kind, dtype == torch.float16, place, zeros, True, offset), operands, dtype)
            assert torch.equal(scaled[0], (exact * 0.5 + 3.0 * offset).to(dtype).double())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "group_size"), [("s4", 128), ("z4", 32), ("u4", 128), ("s8", None), ("u8", 64), ("f8", 128)])
def test_real_sizes(kind: str, group_size: int | None, dtype: torch.dtype) -> None:
    weight = move(make(kind, group_size, (3584, 18944)), "cuda")
    for deterministic in (False, True):
        dispatch.deterministic = deterministic
        try:
            layer = WeightOnlyLinear(weight, None, dtype)
            for rows in (1, 2, 16, 33, 64, 100, 500, 2000):
                x = torch.randn(rows, 18944, device="cuda").to(dtype)
                expected = reference.quantized_linear(x[:64].double(), weight, None)
                error = (layer(x)[:64].double() - expected).norm() / expected.norm()
                assert error < 5e-3, rows
        finally:
            dispatch.deterministic = False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_addresses_beyond_31_bits() -> None:
    weight = move(make("s8", None, (152064, 256)), "cuda")
    layer = WeightOnlyLinear(weight, None, torch.bfloat16)
    dispatch.deterministic = True  # one kernel whatever the rows
    try:
        x = torch.randn(15000, 256, device="cuda").bfloat16()
        expected = reference.quantized_linear(x[-8:].double(), weight, None)
        torch.testing.assert_close(layer(x)[-8:].double(), expected, rtol=2e-2, atol=2e-2)
    finally:
        dispatch.deterministic = False
