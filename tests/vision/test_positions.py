"""Expanded prompts and positions, against what transformers' models compute from the same tokens."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dashinfer.errors import InvalidRequest
from dashinfer.models.vision_config import VisionConfig
from dashinfer.vision.positions import Medium, Span, place_media, video_text

NAMES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
IMAGE, VIDEO, START, END = 151655, 151656, 151652, 151653


def config(kind: str) -> VisionConfig:
    vision = {"hidden_size": 1280, "tokens_per_second": 2} if kind == "qwen2_5_vl" else {}
    return VisionConfig.from_hf({"architectures": [f"{NAMES[kind]}ForConditionalGeneration"], "vision_config": vision})


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> tuple[VisionConfig, Any]:
    """Our config, and transformers' `get_rope_index` of a model of the family, which needs nothing of it but its config."""
    import transformers

    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    model_class = getattr(transformers, f"{NAMES[request.param]}Model")
    model = model_class.__new__(model_class)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(vision_config=vision)
    return config(request.param), model.get_rope_index


def random_prompt(rng: random.Random, config: VisionConfig) -> tuple[list[int], list[Medium]]:
    tokens, media = [rng.randrange(1000) for _ in range(rng.randrange(4))], []
    for _ in range(rng.randrange(1, 5)):
        sides = (2 * rng.randrange(1, 8), 2 * rng.randrange(1, 8))
        if rng.random() < 0.5:
            media.append(Medium("image", (1, *sides)))
            tokens += [START, IMAGE, END]
        else:
            media.append(
                Medium("video", (rng.randrange(1, 6), *sides), seconds_per_step=rng.choice([0.5, 1.0, 0.7, 2 / 3, 3.1]))
            )
            tokens += [START, VIDEO, END] * (media[-1].grid[0] if config.steps_apart else 1)
        tokens += [rng.randrange(1000) for _ in range(rng.randrange(5))]
    return tokens, media


def reference(index: Any, tokens: np.ndarray, media: list[Medium]) -> tuple[np.ndarray, int]:
    ids = torch.from_numpy(tokens).long()[None]
    grids = {kind: [medium.grid for medium in media if medium.kind == kind] for kind in ("image", "video")}
    inputs = {f"{kind}_grid_thw": torch.tensor(found) if found else None for kind, found in grids.items()}
    seconds = [medium.seconds_per_step for medium in media if medium.kind == "video"]
    if "second_per_grid_ts" in index.__code__.co_varnames:
        inputs["second_per_grid_ts"] = seconds
    positions, delta = index(input_ids=ids, mm_token_type_ids=(ids == IMAGE) + 2 * (ids == VIDEO).int(), **inputs)
    return positions[:, 0].numpy(), int(delta)


@pytest.mark.parametrize("seed", range(40))
def test_positions_are_those_of_transformers(family: tuple[VisionConfig, Any], seed: int) -> None:
    config, index = family
    tokens, media = random_prompt(random.Random(seed), config)

    placed = place_media(tokens, media, config)

    positions, delta = reference(index, placed.tokens, media)
    assert placed.positions.dtype == np.int64
    assert placed.positions.tolist() == positions.tolist()
    assert placed.delta == delta
    assert sum(span.length for span in placed.spans) == sum(config.num_tokens(medium.grid) for medium in media)
    covered = np.concatenate([np.arange(span.start, span.start + span.length) for span in placed.spans])
    assert covered.tolist() == np.flatnonzero(np.isin(placed.tokens, (IMAGE, VIDEO))).tolist()


def test_an_image_in_text() -> None:
    placed = place_media([5, START, IMAGE, END, 6], [Medium("image", (1, 4, 6))], config("qwen2_vl"))

    assert placed.tokens.tolist() == [5, START, *[IMAGE] * 6, END, 6]
    assert placed.tokens.dtype == np.int32
    assert placed.spans == (Span(0, 2, 0, 6),)
    assert placed.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]
    assert (placed.delta, placed.end) == (7 - 10, 7)


def test_a_video_by_time_and_one_step_by_step() -> None:
    clip = Medium("video", (3, 2, 4), seconds_per_step=0.75)

    timed = place_media([VIDEO], [clip], config("qwen2_5_vl"))
    apart = place_media([1, VIDEO, 2, VIDEO, 3, VIDEO], [clip], config("qwen3_vl"))

    assert timed.positions[0].tolist() == [0, 0, 1, 1, 3, 3]
    assert apart.spans == (Span(0, 1, 0, 2), Span(0, 4, 2, 2), Span(0, 7, 4, 2))
    assert apart.positions.tolist() == [
        [0, 1, 1, 3, 4, 4, 6, 7, 7],
        [0, 1, 1, 3, 4, 4, 6, 7, 7],
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
    ]


@pytest.mark.parametrize("tokens", [[], [4, 5, 6]])
def test_text_alone(tokens: list[int]) -> None:
    placed = place_media(tokens, [], config("qwen3_vl"))

    assert placed.tokens.tolist() == tokens
    assert placed.positions.tolist() == [list(range(len(tokens)))] * 3
    assert (placed.spans, placed.delta) == ((), 0)


IMAGE_GIVEN = Medium("image", (1, 2, 2))


@pytest.mark.parametrize(
    ("tokens", "media", "message"),
    [
        ([IMAGE], [], "a placeholder for images, but no image was given"),
        ([VIDEO], [IMAGE_GIVEN], "a placeholder for videos, but no video was given"),
        ([IMAGE, IMAGE], [IMAGE_GIVEN], "do not go with the 1 images and 0 videos given"),
        ([1], [IMAGE_GIVEN], "chat template does not show every image and video"),
        ([IMAGE], [IMAGE_GIVEN, Medium("video", (1, 2, 2))], "chat template does not show every image and video"),
        ([VIDEO, IMAGE], [IMAGE_GIVEN, Medium("video", (1, 2, 2))], "do not go with the 1 images and 1 videos"),
    ],
)
def test_placeholders_that_stand_for_nothing_are_the_requests_fault(
    tokens: list[int], media: list[Medium], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        place_media(tokens, media, config("qwen2_vl"))


@pytest.mark.parametrize("seconds", [1e9, float("inf"), float("nan"), -1.0])
def test_a_video_that_never_ends(seconds: float) -> None:
    with pytest.raises(InvalidRequest, match="too long"):
        place_media([VIDEO], [Medium("video", (2, 2, 2), seconds_per_step=seconds)], config("qwen2_5_vl"))


def test_a_slow_video_has_more_positions_than_tokens() -> None:
    placed = place_media([VIDEO, 7], [Medium("video", (5, 2, 2), seconds_per_step=10.0)], config("qwen2_5_vl"))

    assert placed.positions[0].tolist() == [0, 20, 40, 60, 80, 1]
    assert (placed.end, placed.delta) == (81, 75)


def test_the_text_of_a_video_is_that_of_the_processor() -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="(", video_token="*", vision_end_token=")",
    )  # fmt: skip
    processor._calculate_timestamps = lambda *arguments: Qwen3VLProcessor._calculate_timestamps(processor, *arguments)
    metadata = SimpleNamespace(fps=24.0, frames_indices=[0, 11, 23, 34, 46])
    inputs = {"video_grid_thw": np.array([[3, 2, 4]]), "video_metadata": [metadata]}
    expected = Qwen3VLProcessor.replace_video_token(processor, inputs, 0)

    text = video_text([11 / 48, 57 / 48, 92 / 48], start="(", pad="**", end=")")

    assert text == expected == "<0.2 seconds>(**)<1.2 seconds>(**)<1.9 seconds>(**)"
