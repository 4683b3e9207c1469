"""The real backend, up to where a worker would start."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError, StartupError, UnsupportedModel
from dashinfer.serving import detect
from dashinfer.serving.backend import ModelBackend

from .seeing import FAMILIES, source, write_model

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
         "max_position_embeddings": 512}  # fmt: skip


AWQ = {"architectures": ["LlamaForCausalLM"], **SHAPE, "quantization_config": {"quant_method": "awq", "bits": 4}}


def resolve(folder: Path, config: dict, **settings: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    ModelBackend().resolve(ServerConfig(model=str(folder), load_format="dummy", **settings), lambda *event: None)


def test_a_model_that_can_be_served(tmp_path: Path) -> None:
    resolve(tmp_path, {"architectures": ["LlamaForCausalLM"], **SHAPE}, max_length=512)


@pytest.mark.parametrize(
    ("config", "settings", "kind", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, {}, UnsupportedModel, "MambaForCausalLM is not supported"),
        ({"architectures": [7]}, {}, UnsupportedModel, "config.json makes no sense"),
        ({"architectures": ["LlamaForCausalLM"], **SHAPE}, {"max_length": 513}, ConfigurationError, "--max-length 513"),
        (
            {"architectures": ["LlamaForCausalLM"], **SHAPE},
            {"quant_type": "gptq"},
            UnsupportedModel,
            "is not a GPTQ checkpoint",
        ),
        (AWQ, {"quant_type": "fp8"}, UnsupportedModel, r"is quantised already \(AWQ in 4 bits\); leave out --quant-type"),
        (
            AWQ | {"quantization_config": {"quant_method": "aqlm"}},
            {},
            UnsupportedModel,
            "quantised with aqlm are not supported",
        ),
    ],
)
def test_what_cannot_be_served_needs_no_worker_to_say_so(
    tmp_path: Path, config: dict, settings: dict, kind: type[StartupError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        resolve(tmp_path, config, **settings)


# --- vision-language models


def found_bounds(folder: Path, **settings: Any) -> tuple[int, int]:
    config = ServerConfig(model=str(folder), load_format="dummy", **settings)
    image = detect.load_vision(config, ModelBackend().resolve(config, lambda *event: None)).image
    return image.min_pixels, image.max_pixels


@pytest.mark.parametrize(
    ("file", "settings", "bounds"),
    [
        ((3136, 12845056), {}, (3136, 12845056)),
        ((10000, 1000000), {}, (10000, 1000000)),
        ((1, 2**30), {}, (3136, 12845056)),
        ((10000, 1000000), {"min_pixels": 784, "max_pixels": 2000000}, (784, 2000000)),
        ((10000, 1000000), {"max_pixels": 50000}, (10000, 50000)),
    ],
)
def test_bounds_in_pixels(tmp_path: Path, file: tuple[int, int], settings: dict, bounds: tuple[int, int]) -> None:
    """A flag at its default and the model's own: the tighter one; else the flag."""
    write_model(tmp_path, min_pixels=file[0], max_pixels=file[1])

    assert found_bounds(tmp_path, **settings) == bounds


def test_bounds_that_leave_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, min_pixels=50000, max_pixels=60000)

    with pytest.raises(
        ConfigurationError, match="at least 50000 and at most 40000 pixels; this model's own bounds are 50000 and"
    ):
        found_bounds(tmp_path, max_pixels=40000)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["auto", "vlm", "llm"])
def test_what_a_worker_is_told_of_vision(tmp_path: Path, family: str, mode: str) -> None:
    config = ServerConfig(model=str(write_model(tmp_path, family)), load_format="dummy", mode=mode, vision_engine="native")
    backend = ModelBackend()
    source = backend.resolve(config, lambda *event: None)
    (told,) = backend.engine(config, source, lambda progress: None)._worker_configs
    text = backend.text(config, source)

    assert (told.vision, told.vision_engine) == (mode != "llm", "native")
    assert (text.vision is None) == (mode == "llm")
    assert text.template.content_format == "parts"
    if mode == "llm":
        assert told.pixel_values == b""
    else:
        values = np.frombuffer(told.pixel_values, np.float32).reshape(3, 256)
        assert np.array_equal(values, text.vision.image.table())


def test_a_language_model_is_no_vision_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--mode vlm: .* sees nothing; use --mode llm"):
        resolve(tmp_path, {"architectures": ["LlamaForCausalLM"], **SHAPE}, mode="vlm")


def test_a_family_that_is_not_known(tmp_path: Path) -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}, **SHAPE}
    with pytest.raises(
        UnsupportedModel, match="LlavaForConditionalGeneration is a vision-language model; supported are Qwen2VL"
    ):
        resolve(tmp_path, config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preprocessor_config.json": None}, "no preprocessor_config.json says how images are prepared; --mode llm serves"),
        ({"preprocessor_config.json": {"patch_size": 16}}, "has patch_size 16, its config.json 14; --mode llm"),
        (
            {"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}},
            "'CLIPImageProcessor' are not supported",
        ),
        ({"video_preprocessor_config.json": {"image_mean": [0.5] * 3}}, "normalise pixels in different ways; --mode llm"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, changes: dict, words: str) -> None:
    write_model(tmp_path)
    for name, content in changes.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))

    with pytest.raises(UnsupportedModel, match=words):
        found_bounds(tmp_path)
    ModelBackend().resolve(ServerConfig(model=str(tmp_path), load_format="dummy", mode="llm"), lambda *event: None)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path)
    monkeypatch.setattr(detect, "find_spec", lambda name: None if name == "PIL" else object())

    with pytest.raises(
        StartupError, match=r'Pillow is not installed; run: pip install "dashinfer\[serving,vlm\]", or .* --mode llm'
    ):
        found_bounds(tmp_path)
    assert detect.load_vision(ServerConfig(model="m", mode="llm"), source(tmp_path)) is None
