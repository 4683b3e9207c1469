"""What the config of each family means, and what is refused."""

import subprocess
import sys

import pytest

from dashinfer.errors import ConfigurationError, UnsupportedModel
from dashinfer.models.config import ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


def parse(**changes) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA | changes)


def test_what_a_file_leaves_out():
    config = parse()

    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (8, 8, 1e-6)
    assert config.max_positions == config.native_positions == 2048
    assert not any((config.tie_word_embeddings, config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm))
    assert config.windows == (None,) * 4
    assert (config.rope.kind, config.rope.theta, config.rope.rotary_dim) == ("default", 10000.0, 8)


def test_null_means_left_out():
    config = parse(head_dim=None, num_key_value_heads=None, rope_scaling=None)

    assert config == parse()


@pytest.mark.parametrize(
    ("architecture", "settings", "flags"),
    [
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("MistralForCausalLM", {"attention_bias": True}, (False, False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms_of_a_family(architecture, settings, flags):
    config = parse(architectures=[architecture], num_key_value_heads=2, **settings)

    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == flags


def test_model_type_stands_in_for_the_architecture():
    config = {key: value for key, value in LLAMA.items() if key != "architectures"} | {"model_type": "qwen3"}

    assert ModelConfig.from_hf(config | {"num_key_value_heads": 2}).architecture == "Qwen3ForCausalLM"
    assert ModelConfig.from_hf(config | {"num_key_value_heads": 2}).head_dim == 128


@pytest.mark.parametrize(
    ("architecture", "settings", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 10}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 10}, (10,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MistralForCausalLM", {}, (4096,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 10, "max_window_layers": 2}, (None,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 10, "max_window_layers": 2, "use_sliding_window": True}, (None, None, 10, 10)),
        ("Qwen2ForCausalLM", {"sliding_window": None, "use_sliding_window": True}, (None,) * 4),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 7, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            (7, None, 7, None),
        ),
    ],
)
def test_sliding_windows(architecture, settings, windows):
    assert parse(architectures=[architecture], num_key_value_heads=2, **settings).windows == windows


def test_both_spellings_of_rope_scaling_mean_the_same():
    old = parse(rope_theta=500.0, partial_rotary_factor=0.5, rope_scaling={"type": "linear", "factor": 4})
    new = parse(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5})

    assert old == new
    assert (old.rope.kind, old.rope.theta, old.rope.factor, old.rope.rotary_dim) == ("linear", 500.0, 4.0, 4)


@pytest.mark.parametrize(
    ("scaling", "native", "most"),
    [
        (None, 2048, 2048),
        ({"rope_type": "linear", "factor": 4.0}, 8192, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096, 4096),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 2048, 2048),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
             "original_max_position_embeddings": 256},
            2048, 2048,
        ),
    ],
)  # fmt: skip
def test_lengths_that_a_model_reaches(scaling, native, most):
    config = parse(rope_scaling=scaling)

    assert (config.native_positions, config.max_positions) == (native, most)
    assert config.resolve_max_length(None) == min(native, 8192)
    assert config.resolve_max_length(most) == most
    with pytest.raises(ConfigurationError, match=f"--max-length {most} or less"):
        config.resolve_max_length(most + 1)


def test_a_long_model_is_served_at_8192_tokens_unless_more_is_asked_for():
    config = parse(max_position_embeddings=131072)

    assert config.resolve_max_length(None) == 8192
    assert config.resolve_max_length(100_000) == 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Mistral"),
        ({"architectures": None, "model_type": "gpt2"}, "names no architecture"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "vision is not supported yet"),
        ({"architectures": ["Mistral3ForConditionalGeneration"], "vision_config": {}}, "vision is not supported yet"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quantised with hqq are not supported; supported are gptq"),
        ({"hidden_act": "relu"}, "activation 'relu' is not supported"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4', not a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 7}, "hidden_size 64 is no multiple of the 7"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot share 3"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "'longrope' are not supported; supported are default"),
        ({"rope_scaling": {"type": "linear"}}, "factor of the rotary embedding is None"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor of the rotary embedding is -1"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ by the kind of layer"),
        ({"rope_theta": "10000"}, "rope_theta of the rotary embedding is '10000'"),
        ({"partial_rotary_factor": 0.4}, "3 rotated dimensions"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2, "use_sliding_window": True, "layer_types": ["x"]},
            "layers of the type 'x'",
        ),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        parse(**changes)

    assert "\n" not in str(caught.value)


def test_ranks_that_divide():
    """The MLP is shared evenly, and each rank has a head."""
    config = parse(num_key_value_heads=2, intermediate_size=96)
    for size in (1, 2, 3, 4, 6, 8):
        config.check_world_size(size)

    for size in (5, 12):
        with pytest.raises(UnsupportedModel, match=rf"--tensor-parallel {size} does not .*: 1, 2, 3, 4, 6, 8$"):
            config.check_world_size(size)


def test_a_refusal_needs_no_torch():
    code = (
        "import sys; from dashinfer.models import config, memory, shapes\n"
        "try: config.ModelConfig.from_hf({'architectures': ['X']})\n"
        "except Exception as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert output.startswith("the architecture X is not supported")
