"""Reading safetensors, what is refused, progress, and random weights."""

import gc
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dashinfer.errors import InsufficientMemory, ModelNotFound, UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.shapes import tensor_shapes
from dashinfer.models.weights import Part, SafetensorsSource, WeightReader

from . import toy

PROMPT = list(range(1, 30))
CONFIG = toy.SIZES | {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture(scope="module")
def tensors():
    return {name: weight.detach() for name, weight in toy.hf_model("LlamaForCausalLM").named_parameters()}


@pytest.fixture
def save(tmp_path):
    def save_(tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
        save_file(tensors, tmp_path / "model.safetensors")
        return (str(tmp_path / "model.safetensors"),)

    return save_


def test_a_missing_tensor_is_named(tensors, save):
    files = save({name: weight for name, weight in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"})

    with pytest.raises(UnsupportedModel, match=r"lack the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        toy.load(toy.worker_config(files, CONFIG))


def test_a_tensor_of_another_shape_is_named(tensors, save):
    files = save(tensors | {"model.norm.weight": torch.ones(47)})

    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight has the shape \[47\], but .* makes it \[48\]"):
        toy.load(toy.worker_config(files, CONFIG))


def test_a_tensor_that_the_config_does_not_account_for_is_named(tensors, save):
    files = save(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)})

    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn\.q_proj\.bias.* does not account for"):
        toy.load(toy.worker_config(files, CONFIG))


def test_harmless_extras_are_left_alone(tensors, save):
    files = save(
        tensors
        | {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.layers.3.input_layernorm.weight": torch.ones(48),  # a layer for speculative decoding, beyond the model's
        }
    )
    toy.load(toy.worker_config(files, CONFIG))


def test_integers_are_not_weights(tensors, save):
    files = save(tensors | {"model.norm.weight": torch.ones(48, dtype=torch.int8)})

    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight is of the type I8"):
        toy.load(toy.worker_config(files, CONFIG))


def test_pickles_are_refused_by_name(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"\x80\x04")

    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin is not a \.safetensors file"):
        toy.load(toy.worker_config((str(path),), CONFIG))


def test_files_that_are_missing_or_cut_short(tensors, save, tmp_path):
    with pytest.raises(ModelNotFound, match="no such file"):
        SafetensorsSource((str(tmp_path / "none.safetensors"),))
    (path,) = save(tensors)
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ModelNotFound, match=r"model\.safetensors cannot be read, or is incomplete"):
        SafetensorsSource((path,))
    with pytest.raises(ModelNotFound, match="toy has no weight files"):
        toy.load(toy.worker_config((), CONFIG))


def test_memory_is_looked_at_before_the_files():
    with pytest.raises(InsufficientMemory, match="toy: the weights need"):
        toy.load(toy.worker_config(("/nowhere.safetensors",), CONFIG), free=1000)


def test_shares_of_a_tensor(save):
    matrix, vector = torch.arange(60.0).view(6, 10), torch.arange(6.0)
    source = SafetensorsSource(save({"matrix": matrix, "vector": vector}))
    reader = WeightReader(source, dtype=torch.float16, device=torch.device("cpu"), report=lambda *_: None)
    with reader:
        whole, share = Part("matrix", (6, 10)), Part("matrix", (6, 10), rows=(1, 3), columns=(5, 10))
        assert torch.equal(reader.read(whole, whole), torch.cat((matrix, matrix)).half())
        assert torch.equal(reader.read(share), matrix[1:3, 5:].half())
        assert torch.equal(reader.read(Part("matrix", (6, 10), columns=(0, 5))), matrix[:, :5].half())
        assert torch.equal(reader.read(Part("vector", (6,), rows=(2, 4))), vector[2:4].half())


def test_progress_counts_every_byte_once(tmp_path):
    reference = toy.hf_model("LlamaForCausalLM", tie_word_embeddings=True)
    reference.save_pretrained(tmp_path)
    record = []
    toy.load(
        toy.worker_config(toy.weight_files(tmp_path), json.loads((tmp_path / "config.json").read_text())),
        report=lambda *line: record.append(line),
    )

    total = 4 * sum(weight.numel() for weight in reference.parameters())
    assert record[-1] == ("weights", total, total, "B")
    assert {line[2] for line in record} == {total}
    done = [line[1] for line in record]
    assert done == sorted(set(done))
    assert 10 < len(done) <= 101


@pytest.mark.parametrize("data_type", ["float32", "bfloat16", "float16"])
def test_dummy_weights_run(data_type):
    model = toy.load(toy.worker_config((), CONFIG, load_format="dummy", data_type=data_type))

    logits = toy.Session(model, 96, dtype=getattr(torch, data_type)).run(PROMPT)
    assert logits.isfinite().all()
    assert logits.std() > 0
    again = toy.load(toy.worker_config((), CONFIG, load_format="dummy", data_type=data_type))
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def anonymous_memory() -> int:
    """Bytes of this process that are no file's."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
def test_loading_keeps_no_second_copy_in_host_memory(tmp_path):
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    shapes = tensor_shapes(ModelConfig.from_hf(config))
    noise = torch.randn(2048 * 512)
    tensors = {name: noise[: math.prod(shape)].view(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    toy.load(toy.worker_config((), CONFIG, load_format="dummy", data_type="bfloat16"))  # what a process does once
    gc.collect()
    before, seen = anonymous_memory(), []

    model = toy.load(
        toy.worker_config((str(tmp_path / "model.safetensors"),), config, data_type="bfloat16"),
        report=lambda *_: seen.append(anonymous_memory() - before),
    )

    assert len(seen) > 20
    assert model.weight_bytes > 80 << 20
    assert max(seen) < 1.4 * model.weight_bytes
