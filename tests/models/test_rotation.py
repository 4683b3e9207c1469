"""Models whose residual stream is rotated: the same, but for what rounding costs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer.models import linears
from dashinfer.models.decoder import InputEmbeddings
from dashinfer.models.linears import RoundedOnLoad
from dashinfer.models.rotation import MAX_BLOCK, Rotation
from dashinfer_kernels import PagedBatch, dispatch, pack_linear

from . import toy

PROMPT = [(7 * index * index + 3 * index) % 97 for index in range(60)]
SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16}
CPU = torch.device("cpu")


class Unrounded:
    """In place of a QuantizedWeight."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def fits(self, other: "Unrounded") -> bool:
        return False


@pytest.fixture
def without_rounding(monkeypatch):
    monkeypatch.setattr(linears, "quantize_int", lambda weight, **_: Unrounded(weight))
    monkeypatch.setattr(linears, "pack_quantized", lambda weight, bias, **_: pack_linear(weight.values, bias))


def checkpoint(folder, architecture="LlamaForCausalLM", **settings):
    """A random model's files and its config."""
    model = toy.hf_model(architecture, **SIZES, **settings)
    model.save_pretrained(folder)
    return toy.weight_files(folder), model.config.to_dict() | {"architectures": [architecture]}


def load(files, config, **settings):
    return toy.load(toy.worker_config(files, config, **settings))


@pytest.mark.parametrize("channels", [1, 48, 576, 2 * MAX_BLOCK])
def test_it_undoes_itself_and_keeps_lengths(channels):
    x = torch.randn(5, channels)
    rotation = Rotation(channels, CPU)

    rotated = rotation(x)

    torch.testing.assert_close(rotation(rotated), x)
    torch.testing.assert_close(rotated.norm(dim=1), x.norm(dim=1))
    block = min(channels & -channels, MAX_BLOCK)
    spike = rotation(torch.eye(1, channels))
    torch.testing.assert_close(spike.abs(), (torch.arange(channels) < block).float().unsqueeze(0) * block**-0.5)


def test_rows_have_the_same_bits_in_any_company(monkeypatch):
    monkeypatch.setattr(dispatch, "deterministic", True)
    x, rotation = torch.randn(37, 576), Rotation(576, CPU)

    together = rotation(x)

    assert torch.equal(torch.cat([rotation(row) for row in x.split(1)]), together)
    assert torch.equal(rotation(x[5:9]), together[5:9])


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2ForCausalLM", {}),
        ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    ],
)
def test_without_rounding_it_changes_nothing(architecture, settings, without_rounding, tmp_path):
    files, config = checkpoint(tmp_path, architecture, **settings)
    plain, rotated = load(files, config), load(files, config, quant_type="a8w8")

    assert rotated.rotation is not None
    expected, actual = (toy.Session(model, 96).run(PROMPT) for model in (plain, rotated))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_images_are_rotated_where_they_enter(without_rounding, tmp_path):
    files, config = checkpoint(tmp_path)
    plain, rotated = load(files, config), load(files, config, quant_type="a8w8")
    rows = torch.arange(3, 9)
    images = InputEmbeddings(rows, torch.randn(6, 96), (torch.randn(6, 96), torch.randn(6, 96)))

    def hidden(model):
        session = toy.Session(model, 96)
        batch = PagedBatch.build([0], [60], [session.table], block_size=toy.BLOCK_SIZE, device=CPU)
        return model.forward(torch.tensor(PROMPT), batch, session.caches, images=images)

    torch.testing.assert_close(hidden(rotated), hidden(plain), rtol=1e-3, atol=1e-3)


def test_a_channel_that_stands_out_costs_little(tmp_path, monkeypatch):
    files, config = checkpoint(tmp_path)
    tensors = load_file(files[0])
    tensors["model.embed_tokens.weight"][:, 5] = 8.0
    for index in range(3):
        for name in ("input", "post_attention"):
            tensors[f"model.layers.{index}.{name}_layernorm.weight"][:] = 1.0
    save_file(tensors, files[0])
    plain = toy.Session(load(files, config), 96).run(PROMPT)

    def error(**settings):
        found = toy.Session(load(files, config, **settings), 96).run(PROMPT)
        return ((found - plain).norm() / plain.norm()).item()

    rotated = error(quant_type="a8w8")
    monkeypatch.setattr(RoundedOnLoad, "__init__", _without_rotation(RoundedOnLoad.__init__))
    assert rotated < 0.75 * error(quant_type="a8w8")


def _without_rotation(init):
    def changed(self, *arguments, **settings):
        init(self, *arguments, **settings)
        self.rotates = False

    return changed
