import tomllib
from pathlib import Path

from dashinfer.models.vision_config import VisionConfig
from dashinfer.sources.demo_vlm import DIRECTORY
from dashinfer.sources.resolve import resolve
from dashinfer.vision.preprocess import ImageProcessor, read_configs

ROOT = Path(__file__).parents[2]


def test_the_package_carries_a_model_that_sees() -> None:
    source = resolve("demo-vlm")

    assert source.files.name == "demo-vlm"
    assert source.files.weights == (str(DIRECTORY / "model.safetensors"),)
    assert source.generation_config["eos_token_id"]
    assert "<|vision_start|>" in source.tokenizer.chat_template
    vision, processor = VisionConfig.from_hf(source.files.config), ImageProcessor.from_hf(read_configs(DIRECTORY)[0])
    assert (vision.patch_dim, vision.merge_size) == (processor.patch_dim, processor.merge_size)


def test_without_weights() -> None:
    assert resolve("demo-vlm", load_format="dummy").files.weights == ()


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) < 12e6


def test_a_wheel_has_it() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dashinfer"]
    packaged = {path for pattern in data for path in (ROOT / "dashinfer").glob(pattern)}

    assert set(DIRECTORY.iterdir()) <= packaged
