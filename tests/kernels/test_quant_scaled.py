"""Linear layers with inputs and weights in 8 bits, beside float64 products of the same codes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import QuantizedWeight, dispatch, pack_quantized, quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul import scaled
from dashinfer_kernels.quant_matmul.reference import Activations, quantize_rows
from dashinfer_kernels.quant_matmul.weight import FLOAT8
from dashinfer_kernels.quantized_rows import QuantizedRows

ROWS = (1, 33, 70)


WHOLE = scaled.configs


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies small tiles in less time; a GPU has those that it is to have."""
    if torch.cuda.is_available():
        return

    def small(activations: Activations, generation: scaled.Generation) -> dict[str, scaled.Config]:
        known = WHOLE(activations, generation).items()
        return {name: replace(each, block_rows=min(32, each.block_rows), block_out=64) for name, each in known}

    monkeypatch.setattr(scaled, "configs", small)


def make_weight(kind: str, out_features: int, in_features: int, device: str) -> QuantizedWeight:
    values = torch.randn(out_features, in_features) * in_features**-0.5
    if kind == "int8":
        weight = quantize_int(values, bits=8, symmetric=True)
    elif kind == "fp8":
        weight = quantize_float8(values)
    else:
        scales = 0.001 + 0.01 * torch.rand(-(-out_features // 128), -(-in_features // 128))
        weight = QuantizedWeight(codes=(values * 100).to(FLOAT8), scales=scales, group_size=128, block_rows=128)
    return replace(weight, codes=weight.codes.to(device), scales=weight.scales.to(device))


def make_rows(rows: int, columns: int, activations: Activations, device: str) -> QuantizedRows:
    return QuantizedRows(*(each.to(device) for each in quantize_rows(torch.randn(rows, columns), activations)))


def expected(x: QuantizedRows, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    y = (x.values.double() * x.scales.double()[:, None]) @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def check(actual: Tensor, x: QuantizedRows, weight: QuantizedWeight, bias: Tensor | None) -> None:
    """Close to the exact product. Hopper's tensor cores keep 13 bits of a sum of float8 products (arXiv 2411.10958), which is
    128 of them here; the interpreter keeps 23."""
    right = expected(x, weight, bias)
    if weight.codes.dtype == FLOAT8 and actual.is_cuda:
        assert (actual.double() - right).norm() < 2e-3 * right.norm()
        torch.testing.assert_close(actual.double(), right, rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=1e-5)


def activations_of(kind: str) -> Activations:
    return "int8" if kind == "int8" else "fp8"


@pytest.fixture(params=["hopper", "ampere"])
def generation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With tensor descriptors and with pointers; on a GPU what there is."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(scaled, "_generation", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("kind", ["int8", "fp8", "blocks"])
@pytest.mark.parametrize(("out_features", "in_features"), [(136, 304), (40, 16)])
def test_every_form_matches_float64(triton_path: str, generation: str, kind: str, out_features: int, in_features: int) -> None:
    weight = make_weight(kind, out_features, in_features, triton_path)
    bias = torch.randn(out_features, device=triton_path).half()
    layer = scaled.ScaledLinear(weight, bias, torch.float16, activations_of(kind))

    for config in layer._configs.values():
        for rows in (1, 37) if triton_path == "cpu" else (1, 37, 150, 700):
            x = make_rows(rows, in_features, activations_of(kind), triton_path)
            out = torch.full((rows + 1, out_features), torch.nan, dtype=torch.float32, device=triton_path)
            layer._launch(x, out[:rows], config)
            if rows == 1:
                layer._launch(x, out[:rows], config)  # with what the first left behind

            check(out[:rows], x, weight, bias)
            assert out[rows:].isnan().all()
    assert layer._arrived.eq(0).all()


@pytest.mark.parametrize("kind", ["int8", "fp8", "blocks"])
@pytest.mark.parametrize("biased", [False, True])
def test_layers_take_any_number_of_rows(triton_path: str, kind: str, biased: bool) -> None:
    weight = make_weight(kind, 136, 304, triton_path)
    bias = torch.randn(136, device=triton_path).half() if biased else None
    layer = pack_quantized(weight, bias, dtype=torch.float16, activations=activations_of(kind))

    assert isinstance(layer, scaled.ScaledLinear)
    assert layer(torch.empty(0, 304, dtype=torch.float16, device=triton_path)).shape == (0, 136)
    for rows in ROWS:
        x = make_rows(rows, 304, activations_of(kind), triton_path)
        wide, narrow = layer.wide(x), layer(x)

        assert (wide.dtype, narrow.dtype) == (torch.float32, torch.float16)
        check(wide, x, weight, bias)
        torch.testing.assert_close(narrow, wide.half())


@pytest.mark.parametrize("activations", ["int8", "fp8"])
def test_inputs_that_are_not_quantised_are(triton_path: str, activations: Activations) -> None:
    weight = make_weight(activations, 40, 64, triton_path)
    x = torch.randn(3, 2, 64, device=triton_path).half()

    y = pack_quantized(weight, dtype=torch.float16, activations=activations)(x)

    assert y.shape == (3, 2, 40)
    exact = x.view(6, 64).double() @ weight.dequantize().double().T
    assert (y.view(6, 40) - exact).norm() < (0.01 if activations == "int8" else 0.05) * exact.norm()


@pytest.mark.parametrize("kind", ["int8", "fp8", "blocks"])
def test_rows_have_the_same_bits_in_any_company(triton_path: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(dispatch, "deterministic", True)
    weight = make_weight(kind, 136, 304, triton_path)
    bias = torch.randn(136, device=triton_path).half()
    layer = pack_quantized(weight, bias, dtype=torch.float16, activations=activations_of(kind))
    x = make_rows(70, 304, activations_of(kind), triton_path)
    whole = layer(x)

    for start, stop in ((0, 1), (3, 20), (4, 70)):
        part = QuantizedRows(x.values[start:stop], x.scales[start:stop])
        assert torch.equal(layer(part), whole[start:stop])


def test_int8_is_exact_in_every_form(triton_path: str) -> None:
    weight = make_weight("int8", 136, 304, triton_path)
    layer = scaled.ScaledLinear(weight, None, torch.float32, "int8")
    x = make_rows(70, 304, "int8", triton_path)
    outs = []
    for config in layer._configs.values():
        outs.append(torch.empty(70, 136, device=triton_path))
        layer._launch(x, outs[-1], config)

    assert all(torch.equal(outs[0], out) for out in outs)


def test_the_first_call_launches_all_that_later_ones_may(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "_compiled", set())
    launched = []
    monkeypatch.setattr(scaled.ScaledLinear, "_launch", lambda self, x, out, config: launched.append(config))
    layer, other = (
        pack_quantized(make_weight("int8", out, 64, triton_path), dtype=torch.float16, activations="int8") for out in (40, 80)
    )
    layer(make_rows(3, 64, "int8", triton_path))

    assert set(launched) == set(layer._configs.values())
    launched.clear()
    for rows in (1, 20, 300, 5000):
        other(make_rows(rows, 64, "int8", triton_path))
    assert len(launched) == 4


def test_what_is_not_multiplied_here(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(256, 256)
    rows = quantize_int(values, bits=8, symmetric=True)

    assert scaled.multiplies(rows, "int8")
    assert not scaled.multiplies(rows, None)
    assert not scaled.multiplies(rows, "fp8")
    assert not scaled.multiplies(quantize_int(values, bits=8, symmetric=True, group_size=64), "int8")
    assert not scaled.multiplies(quantize_int(values, bits=8, symmetric=False), "int8")
    assert not scaled.multiplies(quantize_int(values[:, :40], bits=8, symmetric=True), "int8")
    assert scaled.multiplies(quantize_float8(values), "fp8")
    assert scaled.multiplies(make_weight("blocks", 256, 256, "cpu"), "fp8")
    monkeypatch.setattr(scaled, "_has_float8", lambda device: False)
    assert not scaled.multiplies(quantize_float8(values), "fp8")


def test_float8_weights_alone_where_tensor_cores_do_not_multiply_it(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "_has_float8", lambda device: False)
    weight = make_weight("fp8", 40, 64, triton_path)
    x = torch.randn(3, 64, device=triton_path)

    layer = pack_quantized(weight, dtype=torch.float32, activations="fp8")

    assert layer.takes is None
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T, rtol=1e-5, atol=1e-5)


def test_layers_hold_the_codes_and_little_else(triton_path: str) -> None:
    weight = make_weight("int8", 512, 1024, triton_path)
    layer = pack_quantized(weight, dtype=torch.float16, activations="int8")

    held = [each for each in vars(layer).values() if isinstance(each, Tensor)]
    assert sum(each.nbytes for each in held) == layer.nbytes
    assert layer.nbytes - weight.codes.nbytes - weight.scales.nbytes < 4096


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("generation", ["hopper", "ampere", "ada", "amd"])
def test_forms_by_rows(monkeypatch: pytest.MonkeyPatch, activations: Activations, generation: scaled.Generation) -> None:
    monkeypatch.setattr(scaled, "configs", WHOLE)

    def form(rows: int, out_features: int, in_features: int = 3584) -> str:
        return scaled.choose_form(rows, out_features, in_features, activations, generation, 132)

    assert [form(rows, 3584) for rows in (1, 16, 17, 40, 64)] == ["16", "16", "32", "64", "64"]
    assert form(256, 3584, 18944) == ("gemm" if (activations, generation == "hopper") == ("fp8", False) else "stream")
    assert form(4096, 37888) in ("gemm", "wide")
    for rows in range(1, 3000, 77):
        assert form(rows, 4608) in scaled.configs(activations, generation)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["int8", "fp8", "blocks"])
@pytest.mark.parametrize(("out_features", "in_features"), [(4608, 3584), (3584, 18944)])
def test_real_sizes(kind: str, out_features: int, in_features: int) -> None:
    if kind != "int8" and not scaled._has_float8(torch.device("cuda")):
        pytest.skip("no float8")
    weight = make_weight(kind, out_features, in_features, "cuda")
    layer = pack_quantized(weight, dtype=torch.bfloat16, activations=activations_of(kind))
    for rows in (1, 16, 100, 300, 1000, 4097):
        x = make_rows(rows, in_features, activations_of(kind), "cuda")
        check(layer.wide(x), x, weight, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_addresses_pass_32_bits() -> None:
    out_features, rows = 152064, 15000
    if torch.cuda.mem_get_info()[0] < 3 * 2 * out_features * rows:
        pytest.skip("needs 14 GB of GPU memory")
    weight = make_weight("int8", out_features, 256, "cuda")
    x = make_rows(rows, 256, "int8", "cuda")
    layer = pack_quantized(weight, dtype=torch.bfloat16, activations="int8")
    last = QuantizedRows(x.values[-3:], x.scales[-3:])
    torch.testing.assert_close(layer(x)[-3:].double(), expected(last, weight, None), rtol=1e-2, atol=1e-2)
