"""Layers over weights of few bits with unquantised activations, in Triton, against the definition in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dashinfer_kernels import QuantizedWeight, dispatch, pack_quantized, quantize_float8, quantize_int, tuning
from dashinfer_kernels.quant_matmul import reference, weight_only
from dashinfer_kernels.quant_matmul.weight import FLOAT8, RANGES
from dashinfer_kernels.quant_matmul.weight_only import WeightOnlyLinear, can_pack, choose_config, pack_words

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


@pytest.mark.parametrize("scale", ["sums", "weights"])
@pytest.mark.parametrize(
    ("kind", "group_size"),
    [("s4", 128), ("s4", 32), ("s4", 16), ("s4", None), ("z4", 64), ("z4", 128), ("z4", None), ("u4", 128), ("u4", 48), ("u4", None),
     ("u2", 32), ("s3", 32), ("s8", None), ("s8", 64), ("s8", 16), ("u8", 128), ("f8", None), ("f8", 128)],
)  # fmt: skip
def test_matches_the_definition(triton_path: str, forced: dict[str, Any], kind: str, group_size: int | None, scale: str) -> None:
    weight = make(kind, group_size)
    if scale == "sums" and weight.offsets is not None and kind != "z4":
        pytest.skip("offsets are added to weights")
    forced |= {"SCALE": scale, "BLOCK_WORDS": 32 if scale == "weights" else 64}
    dtype = torch.float16 if scale == "sums" or kind in ("u4", "f8") else torch.float32
    bias = torch.randn(SHAPE[0]).to(dtype)
    x = (0.5 * torch.randn(3, SHAPE[1])).to(dtype)
    layer = WeightOnlyLinear(move(weight, triton_path), bias.to(triton_path), dtype)

    assert layer.offsets == {"u": "offsets", "z": "zeros"}.get(kind[0], "none")
    check(layer, move(weight, triton_path), x.to(triton_path), bias.to(triton_path), 4e-3 if dtype == torch.float16 else 1e-4)


def move(weight: QuantizedWeight, device: str) -> QuantizedWeight:
    names = ("codes", "scales", "offsets", "order")
    return replace(weight, **{name: None if (t := getattr(weight, name)) is None else t.to(device) for name in names})
