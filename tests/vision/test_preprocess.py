import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dashinfer.errors import InvalidRequest, MediaError, UnsupportedModel
from dashinfer.vision.preprocess import ImageProcessor, read_configs, resized

from .oracle import image_module, oracle
from .pictures import Image, picture

QWEN2 = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
}
QWEN3 = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
CONFIGS = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "small": QWEN2 | {"max_pixels": 9000},
    "bilinear": QWEN2 | {"resample": 2, "rescale_factor": 1 / 127},
    "merge-3": QWEN2 | {"merge_size": 3, "patch_size": 8, "temporal_patch_size": 3, "max_pixels": 20000},
    "defaults": {},
}
# height, width
SIZES = [(1, 1), (1, 200), (28, 28), (56, 84), (37, 53), (200, 1), (300, 301), (13, 700), (99, 64), (224, 224), (333, 60)]


def settings_of(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith(("image_processor", "processor"))}


@pytest.mark.parametrize("name", CONFIGS)
def test_patches_are_those_of_the_image_processor(name: str) -> None:
    pictures = [picture(*size) for size in SIZES]
    expected, grids = oracle(settings_of(CONFIGS[name]), [Image.fromarray(rgb) for rgb in pictures])

    processor = ImageProcessor.from_hf(CONFIGS[name])
    found = [processor.patches(rgb) for rgb in pictures]

    assert [patches.grid for patches in found] == list(map(tuple, grids.tolist()))
    assert {patches.values.dtype for patches in found} == {np.dtype(np.uint8)}
    values = processor.pixel_values(np.concatenate([patches.values for patches in found]))
    assert values.dtype == np.float32
    assert np.array_equal(expected, values)


def test_every_value_of_every_channel() -> None:
    """All 256 values, against the float64 rescaling of transformers."""
    processor = ImageProcessor.from_hf(QWEN2)
    rgb = np.zeros((56, 56, 3), np.uint8)
    rgb[:16, :16] = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)

    expected, _ = oracle(settings_of(QWEN2), [Image.fromarray(rgb)])

    assert np.array_equal(expected, processor.pixel_values(processor.patches(rgb).values))
    assert {len(set(row)) for row in processor.table().tolist()} == {256}


def test_a_formula_in_float32_alone_is_not_enough() -> None:
    """Why there is a table; if this fails, NumPy or the processor rounds otherwise now."""
    processor = ImageProcessor()
    mean, std = (np.array(row, np.float32)[:, None] for row in (processor.mean, processor.std))

    formula = (np.arange(256, dtype=np.float32) * np.float32(1 / 255) - mean) / std

    assert np.count_nonzero(formula != processor.table()) > 100
    assert np.allclose(formula, processor.table(), atol=1e-6)


def test_sizes_follow_the_rule_of_the_model() -> None:
    rng = np.random.default_rng(0)
    for _ in range(2000):
        factor = int(rng.choice([28, 32]))
        height, width = (int(side) for side in np.exp(rng.uniform(0, 9, 2)))
        least = int(np.exp(rng.uniform(3, 11)))
        most = least + int(np.exp(rng.uniform(3, 15)))
        if max(height, width) > 200 * min(height, width):
            continue

        assert image_module().smart_resize(height, width, factor, least, most) == resized(height, width, factor, least, most)


def test_tokens_are_known_before_decoding() -> None:
    processor = ImageProcessor.from_hf(QWEN2)
    for height, width in SIZES:
        patches = processor.patches(picture(height, width))

        tokens = processor.tokens(height, width)

        assert tokens == len(patches.values) // 4
        assert tokens == processor.tokens(width, height), "EXIF orientation does not change the number"
    assert processor.tokens(1000, 1000) == 36 * 36


@pytest.mark.parametrize("size", [(1, 201), (2010, 10), (65000, 300)])
def test_extreme_aspect_ratios_are_refused(size: tuple[int, int]) -> None:
    processor = ImageProcessor()

    with pytest.raises(MediaError, match="one side is more than 200 times the other"):
        processor.tokens(*size)


def test_patches_do_not_copy_the_picture_to_floats() -> None:
    processor = ImageProcessor.from_hf(QWEN2)
    rgb = picture(560, 560)

    patches = processor.patches(rgb)

    assert patches.values.nbytes == 2 * rgb.nbytes
    assert patches.values.shape == (40 * 40, 3 * 2 * 14 * 14)


def test_the_servers_bounds_take_the_place_of_the_files() -> None:
    processor = ImageProcessor.from_hf(QWEN3, min_pixels=5000, max_pixels=100_000)

    assert (processor.min_pixels, processor.max_pixels) == (5000, 100_000)
    assert np.prod(processor.grid(2000, 2000)) * 16 * 16 <= 100_000


def test_a_request_stays_within_the_servers_bounds() -> None:
    processor = ImageProcessor(min_pixels=3136, max_pixels=100_000)

    assert processor.bounded() is processor
    assert processor.bounded(max_pixels=50_000) == ImageProcessor(min_pixels=3136, max_pixels=50_000)
    for bounds in ({"max_pixels": 100_001}, {"min_pixels": 3135}, {"min_pixels": 9000, "max_pixels": 8000}):
        with pytest.raises(InvalidRequest, match="in order and within 3136 to 100000"):
            processor.bounded(**bounds)


@pytest.mark.parametrize(
    ("config", "bounds"),
    [
        ({"size": {"shortest_edge": 4000, "longest_edge": 90000}}, (4000, 90000)),
        ({"size": {"min_pixels": 4000, "max_pixels": 90000}}, (4000, 90000)),
        ({"size": {"shortest_edge": 4000, "longest_edge": 90000}, "min_pixels": 5000, "max_pixels": None}, (5000, 90000)),
        ({}, (3136, 1003520)),
    ],
)
def test_the_spellings_of_bounds(config: dict, bounds: tuple[int, int]) -> None:
    processor = ImageProcessor.from_hf(config)

    assert (processor.min_pixels, processor.max_pixels) == bounds


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIPImageProcessor' are not supported"),
        ({"do_rescale": False}, "do_rescale false"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"merge_size": "2"}, "merge_size is '2'"),
        ({"resample": 9}, "resample is 9"),
        ({"image_mean": [0.5]}, "image_mean is"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std has a zero"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels 10 is above max_pixels 9"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(config: dict, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ImageProcessor.from_hf(config)


def test_a_server_of_language_models_stays_light() -> None:
    names = ("container", "decode", "gif", "header", "preprocess", "sampling", "video")
    lines = [
        *(f"import dashinfer.vision.{name}" for name in names),
        "import sys; print({'numpy', 'PIL', 'av'} & set(sys.modules))",
    ]

    assert subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, check=True).stdout == b"set()\n"


def test_where_the_settings_are_read_from(tmp_path: Path) -> None:
    def write(name: str, content: object) -> None:
        (tmp_path / name).write_text(json.dumps(content))

    with pytest.raises(UnsupportedModel, match=r"no preprocessor_config\.json"):
        read_configs(tmp_path)
    write("preprocessor_config.json", {"patch_size": 1})
    assert read_configs(tmp_path) == ({"patch_size": 1}, {"patch_size": 1})
    write("video_preprocessor_config.json", {"patch_size": 2})
    assert read_configs(tmp_path) == ({"patch_size": 1}, {"patch_size": 2})
    write("processor_config.json", {"image_processor": {"patch_size": 3}, "video_processor": {"patch_size": 4}})
    assert read_configs(tmp_path) == ({"patch_size": 3}, {"patch_size": 4})
    write("processor_config.json", [])
    with pytest.raises(UnsupportedModel, match="not a JSON object"):
        read_configs(tmp_path)
