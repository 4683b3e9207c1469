"""Checkpoints that their own libraries wrote (`checkpoints/make.py`), against what those libraries unpack them to."""

import contextlib
import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer.errors import InsufficientMemory, UnsupportedModel
from dashinfer.models import linears
from dashinfer.models.config import ModelConfig
from dashinfer.models.memory import packed_bytes, weight_bytes
from dashinfer.models.parallel import Group, VocabParallelHead
from dashinfer.models.quantized_config import read_quantization
from dashinfer.models.quantized_formats import checkpoint_format
from dashinfer.models.shapes import tensor_shapes
from dashinfer.models.weights import Part, SafetensorsSource, WeightReader
from dashinfer_kernels.quant_matmul.launch import UnpackedLinear

from . import toy
from .test_parallel import on_ranks

FOLDER = Path(__file__).parent / "checkpoints"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/config.json"))
ROUNDED_INPUTS = ("float8-rows", "float8-static", "fp8-blocks", "fp8-tensors", "int8")
LAYER = "model.layers.0."


def config_of(name: str) -> dict:
    return json.loads((FOLDER / name / "config.json").read_text())


def worker_config(name: str, **settings):
    return toy.worker_config((str(FOLDER / name / "model.safetensors"),), config_of(name), **settings)


def reader(path: Path) -> WeightReader:
    source = SafetensorsSource((str(path),))
    return WeightReader(source, dtype=torch.float32, device=torch.device("cpu"), report=lambda *_: None)


def as_defined(weight, bias=None, *, dtype, activations=None, wide_copy=False):
    """In place of `pack_quantized`: layers as they are defined, whatever the device multiplies."""
    return UnpackedLinear(weight, bias, dtype, activations)


def row(name: str) -> pytest.MarkDecorator:
    """Of README's table."""
    rows = {"gptq": "GPTQ and AWQ checkpoints", "awq": "GPTQ and AWQ checkpoints", "fp8": "Float8 checkpoints"}
    return pytest.mark.feature("Quantisation", rows.get(name.partition("-")[0], "compressed-tensors checkpoints"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=row(name)) for name in NAMES])
def test_logits_and_tokens_equal_those_of_the_library(name, monkeypatch):
    if name in ROUNDED_INPUTS and name != "int8":  # a CPU rounds no inputs to float8
        monkeypatch.setattr(linears, "pack_quantized", as_defined)
    expected = load_file(FOLDER / name / "expected.safetensors")
    session = toy.Session(toy.load(worker_config(name)), 64)
    prompt, spread = expected["prompt"].tolist(), expected["logits"].std()

    logits = session.run(prompt)

    # Both dequantise exactly, and differ by the order of sums in float32; an input at the edge between two codes may then be
    # rounded to the other, which is a step of an eighth in float8.
    tolerance = 0.02 if name in ROUNDED_INPUTS else 2e-5
    assert (logits - expected["logits"]).abs().max() < tolerance * spread
    tokens = []
    for _ in range(len(expected["tokens"])):
        tokens.append(int(logits[-1].argmax()))
        logits = session.run(tokens[-1:])
    assert tokens == expected["tokens"].tolist()
    assert len(set(tokens)) > 3, "a continuation that says nothing"


@pytest.mark.parametrize("name", ["int8", "float8-rows", "float8-static"])
def test_scales_of_inputs_that_differ_from_the_library_matter_little(name):
    expected = load_file(FOLDER / name / "expected.safetensors")

    logits = toy.Session(toy.load(worker_config(name)), 64).run(expected["prompt"].tolist())

    # int8 rounds by 1/254 of a row's greatest input at most, float8 by 1/16 of the input, here and there in other places
    assert (logits - expected["own"]).norm() < (0.05 if name == "int8" else 0.2) * expected["own"].norm()


@pytest.mark.parametrize("name", NAMES)
def test_a_share_is_a_part_of_the_whole(name):
    config = ModelConfig.from_hf(config_of(name))
    form = checkpoint_format(config.quantization)
    compared = {"rows": 0, "columns": 0}
    with reader(FOLDER / name / "model.safetensors") as weights:
        for matrix, shape in tensor_shapes(config).items():
            if not matrix.endswith("_proj.weight") or (whole := form.read(weights, Part(matrix, shape))) is None:
                continue
            dense = whole.dequantize()
            for kind, size in zip(("rows", "columns"), shape, strict=True):
                for share in ((0, size // 2), (size // 2, size)):
                    with contextlib.suppress(UnsupportedModel):  # it cuts a group: see below
                        found = form.read(weights, Part(matrix, shape, **{kind: share})).dequantize()
                        assert torch.equal(found, dense[slice(*share)] if kind == "rows" else dense[:, slice(*share)])
                        compared[kind] += 1

    assert compared["rows"] >= (4 if name == "fp8-blocks" else 14)
    assert compared["columns"] >= (0 if name in ("gptq-4bit-act-order", "gptq-3bit-v2") else 2)


@pytest.mark.parametrize("name", ["awq", "gptq-8bit-rows", "packed-8bit", "int8", "fp8-tensors"])
def test_ranks_together_equal_one(name):
    config = worker_config(name)
    expected = load_file(FOLDER / name / "expected.safetensors")
    prompt = expected["prompt"].tolist()

    logits, _ = on_ranks(2, lambda group: toy.Session(toy.load(config, group), 64, 2).run(prompt))
    # rounded inputs of a share have scales of their own
    tolerance = 0.1 if name in ROUNDED_INPUTS else 2e-5
    assert (logits - expected["logits"]).norm() < tolerance * expected["logits"].norm()


def test_a_quantised_head_is_split():
    name = "gptq-mixed"
    config = ModelConfig.from_hf(config_of(name))
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def head(group: Group) -> torch.Tensor:
        with reader(FOLDER / name / "model.safetensors") as weights:
            weights.format = checkpoint_format(config.quantization)
            return VocabParallelHead.load(weights, "lm_head.weight", 128, 64, group, embedding=None)(hidden)

    expected = head(Group())
    for ranks in (2, 3):  # the last of three has fewer rows
        torch.testing.assert_close(on_ranks(ranks, head)[0], expected)


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_what_the_files_say(name):
    path = FOLDER / name / "model.safetensors"
    config = ModelConfig.from_hf(config_of(name))
    with reader(path) as weights:
        packed = packed_bytes(config, weights.source.sizes)
        stored = sum(weights.source.sizes.values())

    needed = weight_bytes(config, 2, 1, packed=packed)

    assert 0.95 * stored < needed < 1.05 * stored or name in ("gptq-2bit", "gptq-3bit", "gptq-3bit-v2", "gptq-mixed")
    assert stored <= 1.001 * needed < 1.4 * stored


def test_too_little_memory_is_said():
    needed = (FOLDER / "awq" / "model.safetensors").stat().st_size

    toy.load(worker_config("awq", data_type="bfloat16"), free=2 * needed)
    with pytest.raises(InsufficientMemory, match="toy: the weights need"):
        toy.load(worker_config("awq", data_type="bfloat16"), free=needed // 2)


def test_half_precision_stays_close():
    for name in ("gptq-mixed", "packed-4bit-asymmetric"):
        expected = load_file(FOLDER / name / "expected.safetensors")
        session = toy.Session(toy.load(worker_config(name, data_type="bfloat16")), 64, dtype=torch.bfloat16)

        logits = session.run(expected["prompt"].tolist())

        assert (logits - expected["logits"]).norm() < 0.05 * expected["logits"].norm()


def read_scaled(tmp_path: Path, table: dict, tensors: dict[str, torch.Tensor], **share) -> torch.Tensor:
    """Dequantised: the matrix `x`, [16, 64], of a file with these tensors, in a group of compressed-tensors with `table`."""
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    group = {"targets": ["Linear"], "weights": table}
    method = {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": {"a": group}}
    with reader(tmp_path / "model.safetensors") as weights:
        weight = checkpoint_format(read_quantization(method)).read(weights, Part("x.weight", (16, 64), **share))
    assert weight is not None
    return weight.dequantize()


def test_integers_with_zero_points_one_a_byte(tmp_path):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (16, 64), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-128, 128, (16, 2), generator=generator, dtype=torch.int8)
    scales = torch.rand(16, 2, generator=generator)
    expected = (codes.float() - zeros.repeat_interleave(32, 1)) * scales.repeat_interleave(32, 1)
    table = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    tensors = {"weight": codes, "weight_zero_point": zeros, "weight_scale": scales}

    torch.testing.assert_close(read_scaled(tmp_path, table, tensors), expected)
    torch.testing.assert_close(read_scaled(tmp_path, table, tensors, rows=(8, 16), columns=(32, 64)), expected[8:, 32:])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_shapes_of_a_single_scale(shape, tmp_path):
    codes = torch.ones(16, 64).to(torch.float8_e4m3fn)
    table = {"num_bits": 8, "type": "float", "strategy": "tensor"}

    dense = read_scaled(tmp_path, table, {"weight": codes, "weight_scale": torch.full(shape, 3.0)})

    assert torch.equal(dense, torch.full((16, 64), 3.0))


def test_packed_integers_whose_inputs_are_sorted(tmp_path):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (16, 8), generator=generator).int()
    scales = torch.rand(16, 2, generator=generator)
    groups = (torch.arange(64) // 32)[torch.randperm(64, generator=generator)]
    table = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": "group"}
    tensors = {"weight_packed": words, "weight_shape": torch.tensor([16, 64]), "weight_scale": scales}

    dense = read_scaled(tmp_path, table, tensors | {"weight_g_idx": groups.int()})

    codes = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], -1).view(16, 64) - 8
    torch.testing.assert_close(dense, codes * scales[:, groups])


def damaged(name: str, tmp_path: Path, changes: dict[str, torch.Tensor | None], settings: dict | None = None):
    """The worker's config of a checkpoint with some tensors changed, or left out where None."""
    tensors = load_file(FOLDER / name / "model.safetensors")
    for key, value in changes.items():
        assert key in tensors
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, tmp_path / "model.safetensors")
    config = config_of(name)
    config["quantization_config"] |= settings or {}
    return toy.worker_config((str(tmp_path / "model.safetensors"),), config)


Q = f"{LAYER}self_attn.q_proj."


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gptq-2bit", {f"{Q}scales": None}, r"lack the tensor model\.layers\.0\.self_attn\.q_proj\.scales"),
        ("gptq-2bit", {f"{Q}qzeros": None}, r"lack the tensor .*q_proj\.qzeros"),
        ("gptq-2bit", {f"{Q}qweight": None}, r"lack the tensor .*q_proj\.qweight, and .*q_proj\.weight too"),
        ("gptq-2bit", {f"{Q}scales": torch.ones(4, 60).half()}, r"q_proj\.scales has the shape \[4, 60\], but .* \[4, 64\]"),
        ("gptq-2bit", {f"{Q}scales": torch.full((4, 64), torch.nan).half()}, r"q_proj\.scales has scales that are not finite"),
        ("gptq-2bit", {f"{Q}scales": torch.ones(4, 64).int()}, r"q_proj\.scales is of the type int32, where float16 or"),
        ("gptq-2bit", {f"{Q}qweight": torch.ones(8, 64).int()}, r"q_proj\.qweight has the shape \[8, 64\], but .* \[4, 64\]"),
        ("gptq-2bit", {f"{Q}qweight": torch.ones(4, 64)}, r"q_proj\.qweight is of the type float32, where int32 is expected"),
        ("gptq-2bit", {f"{Q}g_idx": torch.zeros(64).int()}, r"q_proj\.g_idx does not have 16 inputs in each group"),
        ("awq", {f"{Q}qweight": torch.ones(64, 4).int()}, r"q_proj\.qweight has the shape \[64, 4\], but .* \[64, 8\]"),
        ("awq", {f"{Q}qzeros": torch.ones(2, 8)}, r"q_proj\.qzeros is of the type float32, where int32"),
        ("packed-4bit", {f"{Q}weight_shape": torch.tensor([64, 60])}, r"weight_shape says \[64, 60\], but .* \[64, 64\]"),
        ("packed-4bit", {f"{Q}weight_scale": torch.ones(64, 1)}, r"weight_scale has the shape \[64, 1\], but .* \[64, 2\]"),
        ("packed-4bit-asymmetric", {f"{Q}weight_zero_point": None}, r"lack the tensor .*weight_zero_point"),
        (
            "packed-4bit-asymmetric",
            {f"{Q}weight_zero_point": torch.ones(64, 2).int()},
            r"weight_zero_point has the shape \[64, 2\], not \[8, 2\]",
        ),
        ("int8", {f"{Q}weight_scale": torch.full((64, 1), torch.inf)}, "scales that are not finite"),
        ("int8", {f"{Q}weight": torch.ones(64, 64).to(torch.float8_e4m3fn)}, r"of the type float8_e4m3fn, where int8"),
        ("fp8-blocks", {f"{Q}weight_scale_inv": None}, r"lack the tensor .*q_proj\.weight_scale_inv"),
        ("fp8-blocks", {f"{Q}weight_scale_inv": torch.ones(2, 1)}, r"weight_scale_inv has the shape \[2, 1\], but .* \[1, 1\]"),
        ("fp8-tensors", {f"{Q}weight": None}, r"lack the tensor .*q_proj\.weight_packed, and .*q_proj\.weight too"),
    ],
)
def test_damage_is_named(name, changes, message, tmp_path):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        toy.load(damaged(name, tmp_path, changes))

    assert "\n" not in str(caught.value)


def test_a_config_that_contradicts_the_files_is_refused(tmp_path):
    for name, settings, message in (
        ("gptq-2bit", {"bits": 4}, r"qweight has the shape \[4, 64\], but .* \[8, 64\]"),
        ("gptq-2bit", {"dynamic": {"-:.*q_proj": {}}}, r"q_proj\.qweight is quantised, but config.json says that .* is not"),
        ("int8", {"ignore": ["re:.*q_proj"]}, r"q_proj\.weight is quantised, but config.json says that .* is not"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            toy.load(damaged(name, tmp_path, {}, settings))


def test_biases_of_zeros_that_the_model_does_not_have_are_left_alone(tmp_path):
    config = damaged("gptq-2bit", tmp_path, {})
    tensors = load_file(config.files.weights[0])
    save_file(tensors | {f"{Q}bias": torch.zeros(64)}, config.files.weights[0])
    toy.load(config)

    save_file(tensors | {f"{Q}bias": torch.ones(64)}, config.files.weights[0])
    with pytest.raises(UnsupportedModel, match=r"q_proj\.bias, which the model's config does not account for"):
        toy.load(config)


def test_a_share_that_cuts_is_refused():
    cases = [
        ("gptq-2bit", "self_attn.o_proj", {"columns": (8, 64)}, "groups of 16, which a share from 8 to 64 cuts"),
        ("gptq-8bit-rows", "mlp.down_proj", {"columns": (2, 96)}, "words of 4, which a share from 2 to 96 cuts"),
        ("gptq-4bit-act-order", "self_attn.o_proj", {"columns": (0, 32)}, r"sorted by activation \(desc_act\)"),
        ("awq", "mlp.up_proj", {"rows": (4, 128)}, "words of 8, which a share from 4 to 128 cuts"),
        ("fp8-blocks", "mlp.up_proj", {"rows": (64, 128)}, "blocks of 128, which a share from 64 to 128 cuts"),
        ("packed-8bit", "mlp.down_proj", {"columns": (2, 96)}, "words of 4"),
    ]
    for name, module, share, message in cases:
        config = ModelConfig.from_hf(config_of(name))
        matrix = f"{LAYER}{module}.weight"
        with reader(FOLDER / name / "model.safetensors") as weights, pytest.raises(UnsupportedModel, match=message) as caught:
            checkpoint_format(config.quantization).read(weights, Part(matrix, tensor_shapes(config)[matrix], **share))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_sizes_that_a_refusal_names_are_those_that_load(name):
    config, sizes = worker_config(name), ModelConfig.from_hf(config_of(name)).tensor_parallel_sizes()
    refused: list[str] = []
    loaded = ["1"]
    for size in sizes[1:]:
        try:
            for rank in range(size):
                toy.load(config, Group(rank, size))
            loaded.append(str(size))
        except UnsupportedModel as error:
            refused.append(str(error))

    assert len(sizes) > 2
    assert all(" cuts model.layers." in message for message in refused)
    assert all(message.endswith(f"these sizes work: {', '.join(loaded)}") for message in refused)


def test_quant_type_has_to_be_the_checkpoints_own():
    def load(name, **settings):
        toy.load(msgspec.structs.replace(worker_config(name), **settings))

    for name, quant_type in (
        ("awq", "a16w4"),
        ("gptq-3bit", "gptq"),
        ("gptq-4bit-asymmetric", "gptq"),
        ("gptq-4bit-asymmetric", "a16w4"),
        ("gptq-8bit-rows", "a16w8"),
        ("packed-8bit", "a16w8"),
        ("int8", "a8w8"),
        ("float8-weights", "fp8"),
        ("fp8-blocks", "fp8"),
    ):
        load(name, quant_type=quant_type)
    for name, quant_type in (("awq", "gptq"), ("gptq-3bit", "a16w4"), ("int8", "a16w8"), ("packed-4bit", "a8w8")):
        with pytest.raises(UnsupportedModel, match=f"--quant-type {quant_type}: toy is quantised already .*; leave out"):
            load(name, quant_type=quant_type)
    with pytest.raises(UnsupportedModel, match=r"leave out --quant-group-size and --quantize-head"):
        load("awq", quant_type="a16w4", quant_group_size=64)
    with pytest.raises(UnsupportedModel, match="random weights are not quantised"):
        load("awq", load_format="dummy")
