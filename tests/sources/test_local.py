import json
from pathlib import Path
from typing import Any

import pytest

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.sources import ModelSource, ReportProgress
from dashinfer.sources.resolve import resolve

pytestmark = pytest.mark.feature("Models", "From Hugging Face or a directory")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    put(tmp_path, **{"config.json": {"model_type": "llama"}, "tokenizer.json": {}, "model.safetensors": "w"})
    return tmp_path


def put(directory: Path, **files: Any) -> None:
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


def found(directory: Path, **options: Any) -> ModelSource:
    return resolve(str(directory), **options)


def test_one_file(directory: Path) -> None:
    put(
        directory, **{"generation_config.json": {"top_k": 3}, "tokenizer_config.json": {"eos_token": "x", "chat_template": "t"}}
    )
    source = found(directory)

    assert source.files.weights == (str(directory / "model.safetensors"),)
    assert source.files.config == {"model_type": "llama"}
    assert source.generation_config == {"top_k": 3}
    assert source.tokenizer.tokenizer_config["eos_token"] == "x"
    assert source.tokenizer.chat_template == "t"


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_older_models_say_in_another_file_how_they_are_quantised(directory: Path, name: str, method: str) -> None:
    put(directory, **{name: {"bits": 4, "group_size": 64}})
    assert found(directory).files.config["quantization_config"] == {"quant_method": method, "bits": 4, "group_size": 64}

    put(directory, **{name: {"bits": 4, "quant_method": "other"}})
    assert found(directory).files.config["quantization_config"]["quant_method"] == "other"

    put(directory, **{"config.json": {"quantization_config": {"bits": 8}}})
    assert found(directory).files.config == {"quantization_config": {"bits": 8}}


def test_shards_go_before_one_file(directory: Path) -> None:
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-1.safetensors"}}
    put(directory, **{"model.safetensors.index.json": index, "model-1.safetensors": "x", "model-2.safetensors": "x"})

    assert found(directory).files.weights == tuple(str(directory / f"model-{i}.safetensors") for i in (1, 2))


def test_a_missing_shard_is_named(directory: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    put(directory, **{"model.safetensors.index.json": index, "model-1.safetensors": "x"})
    with pytest.raises(ModelNotFound, match=r"lacks 1 of 2 weight files, such as model-2\.safetensors"):
        found(directory)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd"])
def test_an_index_stays_in_its_directory(directory: Path, name: str) -> None:
    put(directory, **{"model.safetensors.index.json": {"weight_map": {"a": name}}})
    with pytest.raises(UnsupportedModel, match="outside of its directory"):
        found(directory)


def test_other_names_of_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    put(directory, **{"part-b.safetensors": "x", "part-a.safetensors": "x", "consolidated.safetensors": "x"})

    assert [Path(path).name for path in found(directory).files.weights] == ["part-a.safetensors", "part-b.safetensors"]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("config.json", ModelNotFound, "no config.json"),
        ("tokenizer.json", ModelNotFound, "no tokenizer.json"),
        ("model.safetensors", ModelNotFound, "no weights"),
    ],
)
def test_what_is_missing_is_named(directory: Path, name: str, kind: type[Exception], words: str) -> None:
    (directory / name).unlink()
    with pytest.raises(kind, match=words):
        found(directory)


def test_dummy_weights_need_no_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()

    assert found(directory, load_format="dummy").files.weights == ()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", r"PyTorch \.bin weights only; safetensors are needed"),
        ("m.gguf", "give the file itself: --model /"),
    ],
)
def test_weights_of_another_kind(directory: Path, name: str, words: str) -> None:
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(UnsupportedModel, match=words):
        found(directory)


def test_a_git_lfs_pointer_is_no_weight(directory: Path) -> None:
    put(directory, **{"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"})
    with pytest.raises(ModelNotFound, match="git lfs pull"):
        found(directory)


def test_an_old_tokeniser(directory: Path) -> None:
    (directory / "tokenizer.json").rename(directory / "tokenizer.model")
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        found(directory)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "not valid JSON"), ("[]", "not a JSON object"), ("[" * 5000, "not valid JSON")]
)
def test_broken_json(directory: Path, content: str, words: str) -> None:
    put(directory, **{"config.json": content})
    with pytest.raises(UnsupportedModel, match=words):
        found(directory)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ("t", "t"),
        ([{"name": "tool_use", "template": "u"}, {"name": "default", "template": "t"}], "t"),
        ([{"name": "chat", "template": "t"}], "t"),
        ({"default": "t", "rag": "u"}, "t"),
        ([{"name": "tool_use", "template": "u"}, {"name": "rag", "template": "r"}], None),
        (None, None),
        (5, None),
    ],
)
def test_named_templates(directory: Path, templates: Any, expected: str | None) -> None:
    put(directory, **{"tokenizer_config.json": {"chat_template": templates}})

    assert found(directory).tokenizer.chat_template == expected


def test_places_of_templates(directory: Path) -> None:
    put(directory, **{"chat_template.json": {"chat_template": "json"}})

    assert found(directory).tokenizer.chat_template == "json"
    put(directory, **{"tokenizer_config.json": {"chat_template": "config"}})

    assert found(directory).tokenizer.chat_template == "config"
    put(directory, **{"config.json": {"model_type": "qwen2_5_vl", "vision_config": {}}})

    assert found(directory).tokenizer.chat_template == "json"
    put(directory, **{"chat_template.jinja": "own file"})

    assert found(directory).tokenizer.chat_template == "own file"


def test_a_directory_with_one_gguf(write_gguf: Any, report: ReportProgress) -> None:
    path = write_gguf()

    assert resolve(str(path.parent), report=report).files.weights == (str(path),)
    write_gguf("other.gguf")
    with pytest.raises(ModelNotFound, match="has 2 GGUF models"):
        resolve(str(path.parent), report=report)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nonexistent", "no such file or directory"),
        ("/nonexistent/model", "no such file or directory"),
        ("~/nonexistent", "no such file or directory"),
        ("nonexistent.gguf", "no such file or directory"),
        ("org/name.gguf", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("foo", "neither a path nor a Hugging Face ID .* use --model demo"),
        ("foo bar", "neither a path nor a Hugging Face ID"),
    ],
)
def test_what_is_no_model(model: str, words: str) -> None:
    with pytest.raises(ModelNotFound, match=words):
        resolve(model)


def test_a_file_of_another_kind(directory: Path) -> None:
    with pytest.raises(UnsupportedModel, match="give the directory that holds them"):
        resolve(str(directory / "model.safetensors"))
