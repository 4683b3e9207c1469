"""4- and 8-bit codes in tiles, beside the definition of their values."""

from dataclasses import replace

import pytest
import torch
from test_quant_cpu import random_weight

from dashinfer_kernels import QuantizedWeight, dispatch, loops, pack_linear, pack_quantized, threads
from dashinfer_kernels.quant_matmul import cpu_tiles
from dashinfer_kernels.quant_matmul.cpu import BesideCopy, NibbleLinear, RowLinear
from dashinfer_kernels.quant_matmul.cpu_tiles import TileLinear
from dashinfer_kernels.quant_matmul.reference import quantized_linear

pytestmark = pytest.mark.skipif(not cpu_tiles.fits(random_weight(16, 16), torch.bfloat16), reason="needs Numba and AVX512-BF16")

ROWS = (0, 1, 2, 3, 4, 5, 7, 33, 140)
WEIGHTS = {
    "4 bits, 32": lambda: random_weight(160, 96, bits=4, group_size=32, symmetric=False),
    "4 bits, 128, signed, ordered": lambda: random_weight(70, 512, bits=4, group_size=128, ordered=True),
    "4 bits, whole rows": lambda: random_weight(64, 576, bits=4),
    "4 bits, 8": lambda: random_weight(3, 48, bits=4, group_size=8, symmetric=False),
    "3 bits": lambda: random_weight(64, 256, bits=3, group_size=64, symmetric=False),
    "2 bits, signed": lambda: random_weight(64, 256, bits=2, group_size=64),
    "8 bits, 32": lambda: random_weight(200, 1536, group_size=32),
    "8 bits, 16, offsets, ordered": lambda: random_weight(30, 64, group_size=16, symmetric=False, ordered=True),
    "8 bits, whole rows": lambda: random_weight(131, 100),
    "8 bits, whole long rows": lambda: random_weight(80, 2600),
    "4 bits, long groups": lambda: random_weight(48, 3072, bits=4, group_size=768, symmetric=False),
    "8 bits, large": lambda: random_weight(3000, 1024),  # worth threads
}


@pytest.fixture(params=["few", "many"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of a layer's paths is taken, at any number of rows."""
    most = 2**40 if request.param == "few" else 0
    monkeypatch.setattr(cpu_tiles, "ROWS", {1: most, 2: most})
    return request.param


def packed(weight: QuantizedWeight, bias: torch.Tensor | None = None) -> TileLinear:
    layer = pack_quantized(weight, bias, dtype=torch.bfloat16)
    assert isinstance(layer, TileLinear)
    return layer


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", WEIGHTS)
def test_matches_float64_at_any_number_of_rows(name: str, path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    weight = WEIGHTS[name]()
    bias = torch.randn(weight.out_features).bfloat16()
    layer = packed(weight, bias)

    for rows in ROWS:
        x = torch.randn(rows, weight.in_features).bfloat16()
        actual = layer(x)

        expected = quantized_linear(x.double(), weight, bias.double())
        torch.testing.assert_close(actual.double(), expected, rtol=3e-2, atol=3e-2)
        torch.testing.assert_close(layer.wide(x), actual.float())


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_those_of_the_definition_rounded_to_bfloat16(name: str, path: str) -> None:
    weight = WEIGHTS[name]()

    actual = packed(weight)(torch.eye(weight.in_features).bfloat16()).T.double()

    expected = weight.dequantize().double()
    bound = 2**-8 * expected.abs() + 1.5 * 2**-8 * expected.abs().amax(-1, keepdim=True)
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_are_those_of_float32(bits: int) -> None:
    """Of scales that bfloat16 holds; the inputs' mean, which codes around 128 are multiplied with too, is far from 0."""
    weight = random_weight(48, 1536, bits=bits, group_size=64)
    weight = replace(weight, scales=weight.scales.bfloat16().float())
    x = (torch.randn(5, 1536) + 3).bfloat16()

    torch.testing.assert_close(packed(weight).wide(x), quantized_linear(x.double(), weight, None).float(), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", WEIGHTS)
def test_blocks_of_four_rows_have_the_same_bits_in_any_company(name: str, path: str) -> None:
    weight = WEIGHTS[name]()
    layer, x = packed(weight), torch.randn(21, weight.in_features).bfloat16()
    whole = layer.wide(x)

    alone = () if path == "few" else ((1, 5), (17, 2), (9, 12))
    for start, count in ((0, 4), (4, 4), (8, 8), (0, 20), (20, 1), *alone):
        assert torch.equal(layer.wide(x[start : start + count]), whole[start : start + count])


@pytest.mark.parametrize(("bits", "group_size", "bytes_a_group"), [(4, 32, 16 + 4), (8, 64, 64 + 4), (8, 256, 256 + 4)])
def test_knows_its_size(bits: int, group_size: int, bytes_a_group: int) -> None:
    weight = random_weight(128, 256, bits=bits, group_size=group_size)

    assert packed(weight).nbytes == 128 * 256 // group_size * bytes_a_group


def test_a_wide_copy_serves_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = WEIGHTS["4 bits, 32"]()
    layer = pack_quantized(weight, dtype=torch.bfloat16, wide_copy=True)
    assert isinstance(layer, BesideCopy) and isinstance(layer.narrow, TileLinear)
    copy = pack_linear(weight.dequantize(torch.bfloat16))

    for rows in (1, 8, 9):
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(layer(x), layer.narrow(x) if rows <= 8 else copy(x))


def test_other_layers_serve_what_there_are_no_loops_for(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, whole = random_weight(64, 96, bits=4, group_size=32), random_weight(64, 96)

    assert isinstance(pack_quantized(narrow, dtype=torch.float16), NibbleLinear)
    monkeypatch.setattr(dispatch, "deterministic", True)
    assert isinstance(pack_quantized(narrow, dtype=torch.bfloat16), NibbleLinear)
    monkeypatch.setattr(dispatch, "deterministic", False)
    monkeypatch.setattr(loops, "enabled", False)
    assert isinstance(pack_quantized(whole, dtype=torch.bfloat16), RowLinear)
    monkeypatch.setattr(loops, "enabled", True)
    monkeypatch.setattr(threads, "parallel", None)  # loops would have one thread for what torch has all for
    assert isinstance(pack_quantized(whole, dtype=torch.bfloat16), RowLinear)
    monkeypatch.undo()
    monkeypatch.setattr(cpu_tiles, "_loop", lambda: None)  # another processor
    assert isinstance(pack_quantized(whole, dtype=torch.bfloat16), RowLinear)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.zeros(2, 96).bfloat16()
    x[1, 5] = torch.nan

    assert packed(WEIGHTS["4 bits, 32"]())(x).isnan().all(1).tolist() == [False, True]
