"""Towers, prefills and greedy tokens of Qwen's vision-language models against transformers, on the same tiny random weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashinfer.errors import UnsupportedModel
from dashinfer.models.checkpoint_parts import decoder_part, tower_part
from dashinfer.models.kv_cache import allocate_kv_cache
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.vision_qwen import VisionTower
from dashinfer.models.vision_shapes import tower_bytes, tower_shapes
from dashinfer.models.weights import DummySource, SafetensorsSource, WeightReader
from dashinfer.vision.positions import Medium
from dashinfer_kernels import PagedBatch

from . import toy, vision_toy
from .vision_toy import Models, Session, prompt

SMALL, WIDE, TALL = Medium("image", (1, 4, 4)), Medium("image", (1, 6, 10)), Medium("image", (1, 14, 2))
CLIP = Medium("video", (3, 4, 6), seconds_per_step=0.75)
PARTS = (5, WIDE, 3, CLIP, SMALL, 1, TALL, 7)


@pytest.fixture(scope="module", params=vision_toy.MARKED_FAMILIES)
def models(request, tmp_path_factory) -> Models:
    return vision_toy.make(request.param, tmp_path_factory.mktemp(request.param))


def reference_tower(models, patches, grids):
    with torch.inference_mode():
        output = models.reference.model.visual(vision_toy.pixel_values(patches), torch.tensor(grids))
    return output.pooler_output, list(getattr(output, "deepstack_features", None) or [])


@pytest.mark.parametrize("grids", [[(1, 2, 2)], [(1, 6, 10), (1, 4, 4), (3, 4, 6), (1, 14, 2), (1, 4, 4)]])
def test_the_tower_sees_what_transformers_sees(models, grids):
    torch.manual_seed(1)
    patches = torch.randint(0, 256, (sum(t * h * w for t, h, w in grids), 96), dtype=torch.uint8)
    expected, levels = reference_tower(models, patches, grids)

    output = models.tower.encode(patches, grids)

    torch.testing.assert_close(output.embeddings, expected, atol=1e-4, rtol=1e-4)
    assert len(output.deepstack) == len(levels) == len(models.vision_config.deepstack_blocks)
    for level, right in zip(output.deepstack, levels, strict=True):
        torch.testing.assert_close(level, right, atol=1e-4, rtol=1e-4)
    assert len(expected) == sum(models.vision_config.num_tokens(grid) for grid in grids)
    assert expected.std() > 0.1, "embeddings that say nothing"


def test_an_encode_in_pieces_leaves_room_for_others(models):
    torch.manual_seed(2)
    first, second = torch.randint(0, 256, (2, 24, 96), dtype=torch.uint8)
    alone = [models.tower.encode(each, [(1, 4, 6)]).embeddings for each in (first, second)]

    steps = [models.tower.steps(each, [(1, 4, 6)]) for each in (first, second)]
    ends = []
    for _ in range(models.vision_config.depth):
        for each in steps:
            next(each)
    for each in steps:
        with pytest.raises(StopIteration) as end:
            next(each)
        ends.append(end.value.value.embeddings)

    assert all(torch.equal(*pair) for pair in zip(ends, alone, strict=True))


def test_logits_of_a_prompt_with_pictures(models):
    asked = prompt(models.vision_config, PARTS)
    length = len(asked.placement.tokens)
    with torch.inference_mode():
        expected = models.reference(**asked.reference_inputs(models.family)).logits[0]

    whole = Session(models, asked).prefill(length)
    session = Session(models, asked)
    cuts = [2, 9, 11, 25, 30, 38, length]  # through the first image, the video and others
    chunked = [session.prefill(end - start) for start, end in zip([0, *cuts], cuts, strict=False)]

    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(torch.cat(chunked), expected, atol=2e-4, rtol=0)
    assert expected.std() > 0.5, "logits that say nothing"


def test_pictures_and_places_matter(models):
    asked, other = (prompt(models.vision_config, (4, SMALL, 3), seed) for seed in (0, 1))
    seen = Session(models, asked).prefill(len(asked.placement.tokens))[-1]
    changed = Session(models, vision_toy.Prompt(asked.placement, asked.media, other.patches))
    assert (changed.prefill(changed.offsets[-1] + 9)[-1] - seen).abs().max() > 1e-2

    flat = Session(models, asked)
    tokens, _, images = flat.chunk(len(asked.placement.tokens))
    assert (flat.run(tokens, torch.arange(len(tokens)), images)[-1] - seen).abs().max() > 1e-3


@pytest.mark.parametrize("parts", [PARTS, (3, TALL, 2), (6,)], ids=["all", "tall", "text"])
def test_greedy_tokens(models, parts):
    asked = prompt(models.vision_config, parts)
    with torch.inference_mode():
        expected = models.reference.generate(
            **asked.reference_inputs(models.family), max_new_tokens=12, do_sample=False, pad_token_id=0
        )

    session = Session(models, asked)
    logits = session.prefill(len(asked.placement.tokens))
    produced = [int(logits[-1].argmax())]
    while len(produced) < 12:
        produced.append(int(session.decode(produced[-1])[-1].argmax()))

    assert produced == expected[0, len(asked.placement.tokens) :].tolist()


def test_pictures_and_text_share_a_step(models):
    """A step of a sequence that decodes text, one that begins with text, and one that begins with pictures."""
    seeing, reading = prompt(models.vision_config, (3, SMALL, 2)), prompt(models.vision_config, (9,), seed=1)
    alone = [Session(models, each).prefill(len(each.placement.tokens)) for each in (seeing, reading)]
    session = Session(models, seeing)
    tokens, positions, images = session.chunk(len(seeing.placement.tokens))
    read = reading.placement.tokens.tolist()
    caches = allocate_kv_cache(session.model.config, 8, toy.BLOCK_SIZE, torch.float32, torch.device("cpu"), 1)

    def step(starts, lengths, tables, ids, positions, images):
        batch = PagedBatch.build(starts, lengths, tables, block_size=toy.BLOCK_SIZE, device=torch.device("cpu"))
        hidden = session.model.forward(torch.tensor(ids), batch, caches, positions=positions, images=images)
        return session.model.logits(hidden)

    step([0], [8], [[3]], read[:8], torch.arange(8), None)
    images = type(images)(images.rows + 1, images.values, images.deepstack)
    mixed = torch.cat((torch.full((3, 1), 8), torch.from_numpy(positions.copy())), 1)
    logits = step([8, 0], [1, len(tokens)], [[3], [6, 1]], [read[8], *tokens], mixed, images)

    torch.testing.assert_close(logits[0], alone[1][-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1:], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", [False, True], ids=["old names", "new names"])
def test_both_layouts_of_names(models, inner, tmp_path):
    weights = {}
    for name, tensor in load_file(models.folder / "model.safetensors").items():
        plain = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        if inner:
            plain = plain.replace("model.", "model.language_model.").replace("visual.", "model.visual.")
        weights[plain] = tensor
    save_file(weights, tmp_path / "model.safetensors")
    files = toy.weight_files(tmp_path)

    decoder, tower = decoder_part(SafetensorsSource(files)), tower_part(SafetensorsSource(files))

    assert {"model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.o_proj.weight"} <= decoder.sizes.keys()
    assert {name: tower.shape(name) for name in tower.sizes} == tower_shapes(models.vision_config)
    assert len(decoder.sizes) + len(tower.sizes) == len(weights)
    asked = prompt(models.vision_config, (2, SMALL, 2))
    renamed = Models(models.family, None, tmp_path)
    renamed.__dict__["config"] = models.config
    expected, actual = (Session(each, asked).prefill(10) for each in (models, renamed))
    assert torch.equal(actual, expected)


def test_half_precision_stays_close_to_float32(models):
    asked = prompt(models.vision_config, PARTS)
    exact = asked.encode(models.tower)

    rounded = asked.encode(vision_toy.load_tower(models.folder, models.config, torch.bfloat16))

    for right, near in zip((exact.embeddings, *exact.deepstack), (rounded.embeddings, *rounded.deepstack), strict=True):
        assert near.dtype == torch.bfloat16
        assert (near.float() - right).norm() < 0.03 * right.norm()


def test_random_weights_of_the_right_size(models):
    config = models.vision_config
    source = DummySource(tower_shapes(config))
    with WeightReader(source, dtype=torch.float32, device=torch.device("cpu"), report=lambda *_: None) as reader:
        tower = VisionTower(config, reader, vision_toy.PIXEL_VALUES)

    assert tower.weight_bytes == models.tower.weight_bytes == tower_bytes(config, 4)
    parameters = sum(weight.numel() for weight in models.reference.model.visual.parameters())
    assert tower_bytes(config, 4) == 4 * parameters
    assert tower.encode(torch.zeros(4, 96, dtype=torch.uint8), [(1, 2, 2)]).embeddings.isfinite().all()


def test_tensors_that_the_config_does_not_account_for_are_refused(models, tmp_path):
    weights = load_file(models.folder / "model.safetensors")
    prefix = next(name for name in weights if "visual.blocks.0." in name).split("blocks")[0]
    save_file(weights | {f"{prefix}blocks.0.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")

    with pytest.raises(UnsupportedModel, match=r"visual\.blocks\.0\.extra\.weight, which the model's config"):
        vision_toy.load_tower(tmp_path, models.config)


def test_the_whole_config_file_is_understood(models):
    config, reference = models.vision_config, models.reference.config
    vision = reference.vision_config

    assert config == VisionConfig.from_hf({**models.config, "architectures": None})
    assert (config.depth, config.num_heads, config.patch_size) == (vision.depth, 2, 4)
    assert config.patch_dim == 96
    assert (config.image_token, config.video_token) == (vision_toy.IMAGE, vision_toy.VIDEO)
    assert json.loads((models.folder / "config.json").read_text()) == models.config
