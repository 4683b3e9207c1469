"""Every mode on every family: the logits are those of a model whose weights were rounded beforehand."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer.errors import UnsupportedModel
from dashinfer.models.quantization import rounding
from dashinfer_kernels import quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul.reference import quantize_rows

from . import toy

PROMPT = [(7 * index * index + 3 * index) % 97 for index in range(60)]
SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
FAMILIES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """(folder of a random model's files, its config)"""
    folder = tmp_path_factory.mktemp(request.param)
    reference = toy.hf_model(request.param, **SIZES)
    reference.save_pretrained(folder)
    return folder, reference.config.to_dict() | {"architectures": [request.param]}


def logits(files, config, **settings) -> torch.Tensor:
    """Of a prompt read in one piece, then token by token."""
    session = toy.Session(toy.load(toy.worker_config(files, config, **settings)), 96)
    return torch.cat((session.run(PROMPT[:50]), *(session.run([token]) for token in PROMPT[50:])))


def rounded_files(folder, round_, target) -> tuple[str, ...]:
    """The files with every matrix of the layers rounded."""
    tensors = {name: tensor for path in toy.weight_files(folder) for name, tensor in load_file(path).items()}
    save_file(
        {name: round_(w) if name.endswith("_proj.weight") else w for name, w in tensors.items()}, target / "model.safetensors"
    )
    return toy.weight_files(target)


@pytest.mark.parametrize(
    ("quant_type", "group_size", "round_"),
    [
        ("a16w8", None, lambda w: quantize_int(w, bits=8, symmetric=True)),
        ("a16w8", 32, lambda w: quantize_int(w, bits=8, group_size=32, symmetric=True)),
        ("a16w4", None, lambda w: quantize_int(w, bits=4, group_size=32, symmetric=False)),  # 128 divides neither 96 nor 160
        ("a16w4", 32, lambda w: quantize_int(w, bits=4, group_size=32, symmetric=False)),
        ("fp8", None, quantize_float8),
    ],
    ids=["a16w8", "a16w8-g32", "a16w4", "a16w4-g32", "fp8"],
)
def test_weight_only_modes_compute_with_the_rounded_weights(model, quant_type, group_size, round_, tmp_path):
    folder, config = model
    files = toy.weight_files(folder)

    actual = logits(files, config, quant_type=quant_type, quant_group_size=group_size)

    expected = logits(rounded_files(folder, lambda w: round_(w).dequantize(), tmp_path), config)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
    plain = logits(files, config)
    error = ((actual - plain).norm() / plain.norm()).item()
    assert 1e-4 < error < {"a16w8": 0.1, "a16w4": 1.0, "fp8": 0.4}[quant_type]


@pytest.mark.feature("Quantisation", "Weights and activations of 8 bits")
def test_a8w8_rounds_what_goes_into_layers_too(model):
    folder, config = model
    files = toy.weight_files(folder)
    plain = logits(files, config)

    def error(quant_type):
        return ((logits(files, config, quant_type=quant_type) - plain).norm() / plain.norm()).item()

    assert 1e-3 < error("a16w8") < error("a8w8") < 0.15


def test_rounded_rows_are_within_half_a_step():
    x = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 50.0, 0.0, 7.0]).unsqueeze(1)

    values, scales = quantize_rows(x, "int8")

    assert values.dtype == torch.int8
    assert ((values.float() * scales.unsqueeze(1) - x).abs() <= 0.501 * scales.unsqueeze(1)).all()
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127]


def test_the_output_layer_keeps_its_bits_unless_asked(model):
    folder, config = model
    files = toy.weight_files(folder)

    def load(**settings):
        return toy.load(toy.worker_config(files, config, quant_type="a16w4", **settings))

    kept, quantised = load(), load(quantize_head=True)

    hidden = torch.randn(3, SIZES["hidden_size"])
    plain = toy.load(toy.worker_config(files, config)).logits(hidden)
    torch.testing.assert_close(kept.logits(hidden), plain)
    assert not torch.allclose(quantised.logits(hidden), plain, rtol=1e-3, atol=1e-3)


def test_gptq_needs_such_a_checkpoint(model):
    folder, config = model

    with pytest.raises(UnsupportedModel, match="--quant-type gptq: toy is not a GPTQ checkpoint"):
        toy.load(toy.worker_config(toy.weight_files(folder), config, quant_type="gptq"))


def test_groups_are_halved_until_they_fit():
    assert rounding("a16w4", None).group_for(576) == 64
    assert rounding("a16w4", None).group_for(4096) == 128
    assert rounding("a16w4", 32).group_for(48) == 16
    assert rounding("a16w8", None).group_for(48) is None
