"""Configs of vision-language models: defaults as transformers has them, and what is refused."""

import subprocess
import sys

import pytest
import transformers

from dashinfer.errors import UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.vision_config import VisionConfig

NAMES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
TEXT = {"hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 9}


def hub(kind: str, **vision):
    """As small a config.json as the hub could have."""
    return {"architectures": [f"{NAMES[kind]}ForConditionalGeneration"], "model_type": kind, "vision_config": vision}


@pytest.mark.parametrize("kind", NAMES)
def test_defaults_are_those_of_transformers(kind):
    reference = getattr(transformers, f"{NAMES[kind]}Config")(
        text_config={**TEXT, "num_key_value_heads": 2}, vision_config={} if kind != "qwen2_5_vl" else {"hidden_size": 1280}
    )
    vision, text = reference.vision_config, reference.text_config
    written = {} if kind != "qwen2_5_vl" else {"hidden_size": 1280}

    config = VisionConfig.from_hf(hub(kind, **written))

    assert (config.depth, config.num_heads, config.channels) == (vision.depth, vision.num_heads, vision.in_channels)
    assert (config.patch_size, config.temporal_patch_size) == (vision.patch_size, vision.temporal_patch_size)
    assert config.merge_size == vision.spatial_merge_size
    assert config.hidden_size == getattr(vision, "embed_dim", vision.hidden_size)
    assert config.out_hidden_size == getattr(vision, "out_hidden_size", vision.hidden_size)
    assert config.intermediate_size == getattr(vision, "intermediate_size", 4 * config.hidden_size)
    assert config.tokens_per_second == getattr(vision, "tokens_per_second", None)
    assert config.full_attention_blocks == tuple(getattr(vision, "fullatt_block_indexes", ()))
    assert config.deepstack_blocks == tuple(getattr(vision, "deepstack_visual_indexes", ()))
    assert config.window == (4 if kind == "qwen2_5_vl" else None)
    assert config.positions_side == (48 if kind == "qwen3_vl" else None)
    assert config.rope_theta == vision.rope_parameters["rope_theta"]
    assert (config.image_token, config.video_token) == (reference.image_token_id, reference.video_token_id)

    decoder = ModelConfig.from_hf({**hub(kind), "text_config": {**TEXT, "num_key_value_heads": 2}}, vision=True)
    assert decoder.rope.theta == text.rope_parameters["rope_theta"]
    assert decoder.norm_eps == text.rms_norm_eps
    assert decoder.max_positions == text.max_position_embeddings
    assert decoder.windows == (None,) * 3
    assert decoder.rope.mrope_section == ((24, 20, 20) if kind == "qwen3_vl" else (16, 24, 24))
    assert decoder.rope.mrope_interleaved == decoder.qk_norm == (kind == "qwen3_vl")
    assert decoder.qkv_bias == (kind != "qwen3_vl")


def test_old_files_keep_the_decoder_beside_the_tower():
    old = {
        **hub("qwen2_vl"), **TEXT, "num_key_value_heads": 2, "rope_theta": 1000.0, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [32, 16, 16]},
    }  # fmt: skip
    new = {
        **hub("qwen2_vl"),
        "text_config": {
            **TEXT,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [32, 16, 16]},
            "tie_word_embeddings": True,
        },
    }

    config = ModelConfig.from_hf(old, vision=True)

    assert config == ModelConfig.from_hf(new, vision=True)
    assert (config.rope.kind, config.rope.theta, config.rope.mrope_section) == ("default", 1000.0, (32, 16, 16))
    assert config.tie_word_embeddings


@pytest.mark.parametrize("kind", NAMES)
def test_servers_refuse_vision_until_it_is_wired(kind):
    with pytest.raises(UnsupportedModel, match="vision is not supported yet"):
        ModelConfig.from_hf({**hub(kind), **TEXT})


@pytest.mark.parametrize(
    ("kind", "vision", "message"),
    [
        ("qwen2_vl", {"hidden_act": "relu"}, "activation 'relu' of the vision tower"),
        ("qwen2_5_vl", {"hidden_size": 1280, "hidden_act": "gelu"}, "activation 'gelu' of the vision tower"),
        ("qwen2_vl", {"num_heads": 7}, "7 heads of a vision tower of 1280"),
        ("qwen2_vl", {"embed_dim": 64}, "not of a multiple of 8 dimensions"),
        ("qwen2_vl", {"patch_size": [14, 16]}, r"patch_size is \[14, 16\], not a positive integer"),
        ("qwen2_vl", {"depth": 0}, "depth is 0"),
        ("qwen2_5_vl", {"hidden_size": 1280, "window_size": 27}, "window_size of the vision tower is less than a token"),
        ("qwen2_5_vl", {"hidden_size": 1280, "fullatt_block_indexes": [7, 32]}, "not ascending numbers below 32"),
        ("qwen3_vl", {"deepstack_visual_indexes": [8, 5]}, "not ascending numbers below 27"),
        ("qwen3_vl", {"deepstack_visual_indexes": 8}, "is 8, not a list of numbers"),
        ("qwen3_vl", {"num_position_embeddings": 2300}, "2300, not a square"),
    ],
)
def test_what_is_refused(kind, vision, message):
    with pytest.raises(UnsupportedModel, match=message):
        VisionConfig.from_hf(hub(kind, **vision))


@pytest.mark.parametrize("section", [[1, 2], [16, 24, 25], "abc", [64, 0.0, 0], None])
def test_sections_that_do_not_make_a_head(section):
    with pytest.raises(UnsupportedModel, match="not three numbers that make 64 frequencies"):
        ModelConfig.from_hf({**hub("qwen2_vl"), **TEXT, "num_key_value_heads": 2, "rope_scaling": {
            "type": "mrope", "mrope_section": section}}, vision=True)  # fmt: skip


def test_other_models_have_no_tower_here():
    with pytest.raises(UnsupportedModel, match="LlavaForConditionalGeneration has no vision tower that is supported"):
        VisionConfig.from_hf({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}})
    with pytest.raises(UnsupportedModel, match="supported are Qwen2VLForConditionalGeneration"):
        ModelConfig.from_hf({"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}, vision=True)


def test_the_parent_needs_no_torch():
    code = (
        "import sys; from dashinfer.models import vision_layout, vision_shapes\n"
        "from dashinfer.vision import positions\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
