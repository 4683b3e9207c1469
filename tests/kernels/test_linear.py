import ctypes
import math

import pytest
import torch

from dashinfer_kernels import dispatch, pack_linear
from dashinfer_kernels.linear import cpu, launch, reference
from dashinfer_kernels.linear.cpu import PackedLinear


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize(("out_features", "in_features"), [(5, 7), (64, 64), (129, 96), (960, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_matches_float64_at_any_number_of_rows(
    out_features: int, in_features: int, biased: bool, dtype: torch.dtype, tolerance: float
) -> None:
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features).to(dtype) if biased else None
    layer = pack_linear(weight.clone(), bias)

    for rows in (0, 1, 3, 17, 130):
        x = torch.randn(rows, in_features).to(dtype)
        actual = layer(x)

        assert actual.shape == (rows, out_features)
        assert actual.dtype == dtype
        expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_takes_rows_that_are_not_contiguous() -> None:
    weight, x = torch.randn(8, 6), torch.randn(4, 12)[:, ::2]

    torch.testing.assert_close(pack_linear(weight)(x), x @ weight.T)


def test_takes_a_weight_that_is_a_view() -> None:
    whole, x = torch.randn(20, 6), torch.randn(3, 6)

    torch.testing.assert_close(pack_linear(whole[::2])(x), x @ whole[::2].T)


def test_knows_its_sizes() -> None:
    layer = pack_linear(torch.zeros(8, 6), torch.zeros(8))

    assert (layer.out_features, layer.in_features, layer.nbytes) == (8, 6, 4 * (8 * 6 + 8))


def test_keeps_no_reference_to_the_weight_it_packed() -> None:
    weight = torch.randn(8, 6)
    expected = torch.ones(1, 6) @ weight.T
    layer = pack_linear(weight)
    weight.zero_()

    torch.testing.assert_close(layer(torch.ones(1, 6)), expected)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(64, 32), (16, 32), (70, 34), (1, 2), (960, 576), (576, 1536), (130, 100), (576, 30)]
)
def test_blocks_are_where_and_what_they_are_said_to_be(out_features: int, in_features: int, threads: int) -> None:
    torch.set_num_threads(threads)
    weight = torch.randn(out_features, in_features).bfloat16()
    layer = PackedLinear(weight, None)
    address, shape = layer.blocks, (-(-out_features // 64), -(-in_features // 32) * 16, 64, 2)
    if address is None:
        pytest.skip("this processor's layout is another")

    values = (ctypes.c_char * (2 * math.prod(shape))).from_address(address)
    blocks = torch.frombuffer(values, dtype=torch.bfloat16).view(shape)
    actual = blocks.permute(0, 2, 1, 3).reshape(shape[0] * 64, -1)[:out_features, :in_features]
    assert torch.equal(actual, weight)


@pytest.mark.parametrize("places", [1, 64, 4096])
def test_other_layouts_are_not_taken_for_blocks(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedLinear(torch.randn(192, 96).bfloat16(), None)
    memory = cpu._memory
    monkeypatch.setattr(cpu, "_memory", lambda packed: memory(packed).roll(places))
    cpu._in_blocks.cache_clear()
    assert layer.blocks is None
    monkeypatch.setattr(cpu, "_memory", lambda packed: memory(packed)[:-64])
    cpu._in_blocks.cache_clear()
    assert layer.blocks is None
    cpu._in_blocks.cache_clear()


@pytest.mark.parametrize(("dtype", "in_features"), [(torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 63)])
def test_weights_that_are_not_in_blocks(dtype: torch.dtype, in_features: int) -> None:
    assert PackedLinear(torch.randn(64, in_features).to(dtype), None).blocks is None


@pytest.mark.feature("Parallelism and recovery", "Same bits in any company")
@pytest.mark.parametrize(("out_features", "in_features", "biased"), [(70, 100, True), (64, 64, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_invariant_rows_have_the_same_bits_in_any_company(
    triton_path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, out_features: int, in_features: int, biased: bool
) -> None:
    if dtype == torch.bfloat16 and triton_path == "cpu":
        pytest.skip("the interpreter cannot multiply bfloat16")
    monkeypatch.setattr(dispatch, "deterministic", True)
    weight = (torch.randn(out_features, in_features) * in_features**-0.5).to(dtype).to(triton_path)
    bias = torch.randn(out_features).to(dtype).to(triton_path) if biased else None
    x = torch.randn(140, in_features).to(dtype).to(triton_path)
    layer = pack_linear(weight, bias)
    whole = layer(x)

    assert whole.dtype == dtype
    expected = reference.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(whole.double(), expected, rtol=tolerance, atol=tolerance)
    for rows in (1, 3, 16, 100):
        for start in (0, 5, 40):
            assert torch.equal(layer(x[start : start + rows]), whole[start : start + rows])
    assert torch.equal(layer(x.flip(0)), whole.flip(0))


def test_invariant_linear_of_no_rows_and_of_rows_with_gaps(triton_path: str) -> None:
    weight, x = torch.randn(8, 6, device=triton_path), torch.randn(4, 12, device=triton_path)[:, ::2]

    assert launch.invariant_linear(x[:0], weight, None).shape == (0, 8)
    torch.testing.assert_close(launch.invariant_linear(x, weight, None), x @ weight.T)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("out_features", [152064, 3584])
def test_invariant_linear_of_a_real_size(out_features: int) -> None:
    weight = (torch.randn(out_features, 3584, device="cuda") * 3584**-0.5).bfloat16()
    x = torch.randn(15000, 3584, device="cuda").bfloat16()  # with the greater size, past 2**31 outputs
    whole = launch.invariant_linear(x, weight, None)

    for start, rows in ((0, 1), (7, 130), (14990, 10)):
        part = x[start : start + rows]
        assert torch.equal(launch.invariant_linear(part, weight, None), whole[start : start + rows])
        expected = reference.linear(part.double(), weight.double(), None)
        torch.testing.assert_close(whole[start : start + rows].double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wide_results_are_not_rounded_to_the_weights_type(
    triton_path: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, deterministic: bool
) -> None:
    monkeypatch.setattr(dispatch, "deterministic", deterministic)
    x = torch.randn(5, 96, device=triton_path).to(dtype)
    weight = torch.randn(40, 96, device=triton_path).to(dtype)
    linear = launch.PlainLinear(weight, None)

    wide = linear.wide(x)

    assert wide.dtype == torch.float32
    exact = x.double() @ weight.double().T
    rounded = dtype == torch.float16 and not deterministic and triton_path == "cpu"  # where torch offers no wide product
    torch.testing.assert_close(wide.double(), exact, rtol=2e-3 if rounded else 1e-5, atol=2e-2 if rounded else 1e-4)
