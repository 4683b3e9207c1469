"""Logits of every family and RoPE variant against transformers, on the same tiny random weights."""

import json

import pytest
import torch

from dashinfer.models.kv_cache import allocate_kv_cache
from dashinfer_kernels import PagedBatch

from . import toy

PROMPT = [(7 * index * index + 3 * index) % 97 for index in range(60)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("LlamaForCausalLM", {"head_dim": 32, "num_key_value_heads": 6}),
    "llama-gelu": ("LlamaForCausalLM", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 17}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-biases": ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "rope-theta": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "rope-linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "rope-dynamic": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "rope-llama3": (
        "LlamaForCausalLM",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 500.0}},
    ),
    "rope-yarn": (
        "Qwen2ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24, "rope_theta": 1000.0
            }
        },
    ),
    "rope-yarn-mscale": (
        "LlamaForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 3.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 100.0,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            }
        },
    ),
}  # fmt: skip


def row(architecture: str) -> pytest.MarkDecorator:
    """Of README's table."""
    name = {"Qwen2ForCausalLM": "Qwen2, Qwen2.5", "Qwen3ForCausalLM": "Qwen3"}.get(architecture, "Llama, Mistral")
    return pytest.mark.feature("Models", name)


@pytest.mark.parametrize("case", [pytest.param(case, marks=row(architecture)) for case, (architecture, _) in CASES.items()])
def test_logits_equal_those_of_transformers(case, tmp_path):
    architecture, settings = CASES[case]
    reference = toy.hf_model(architecture, **settings)
    reference.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]

    model = toy.load(toy.worker_config(toy.weight_files(tmp_path), json.loads((tmp_path / "config.json").read_text())))

    whole = toy.Session(model, 96).run(PROMPT)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    session = toy.Session(model, 96)
    chunked = [session.run(PROMPT[:13]), session.run(PROMPT[13:40])]
    chunked += [session.run([token]) for token in PROMPT[40:]]
    torch.testing.assert_close(torch.cat(chunked), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5, "logits that say nothing"


def test_dynamic_rope_beyond_its_length_is_that_of_a_prompt_of_the_length_served(tmp_path):
    settings = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    reference = toy.hf_model("LlamaForCausalLM", max_position_embeddings=40, **settings)
    reference.save_pretrained(tmp_path)
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]
    config = json.loads((tmp_path / "config.json").read_text())

    model = toy.load(toy.worker_config(toy.weight_files(tmp_path), config, max_length=len(PROMPT)))

    torch.testing.assert_close(toy.Session(model, 96).run(PROMPT), expected, atol=1e-4, rtol=0)


@pytest.mark.feature("Models", "From Hugging Face or a directory")
def test_sharded_safetensors_give_the_same_model(tmp_path):
    reference = toy.hf_model("Qwen2ForCausalLM")
    reference.save_pretrained(tmp_path, max_shard_size="60KB")
    files = toy.weight_files(tmp_path)
    assert len(files) > 2
    with torch.inference_mode():
        expected = reference(torch.tensor([PROMPT])).logits[0]

    model = toy.load(toy.worker_config(files, json.loads((tmp_path / "config.json").read_text())))

    torch.testing.assert_close(toy.Session(model, 96).run(PROMPT), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("data_type", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(data_type, tmp_path):
    reference = toy.hf_model("Qwen3ForCausalLM", head_dim=16)
    reference.save_pretrained(tmp_path)
    files, config = toy.weight_files(tmp_path), json.loads((tmp_path / "config.json").read_text())
    exact = toy.Session(toy.load(toy.worker_config(files, config)), 96).run(PROMPT)

    model = toy.load(toy.worker_config(files, config, data_type=data_type))
    logits = toy.Session(model, 96, dtype=getattr(torch, data_type)).run(PROMPT)

    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 0.05 * exact.norm()


def test_a_step_of_several_sequences_equals_each_alone():
    config = toy.SIZES | {"architectures": ["MistralForCausalLM"], "sliding_window": 11}
    model = toy.load(toy.worker_config((), config, load_format="dummy"))
    prompts = [PROMPT[:20], PROMPT[7:9], PROMPT[30:55]]
    alone = [toy.Session(model, 96).run(prompt)[-1] for prompt in prompts]

    caches = allocate_kv_cache(model.config, 12, toy.BLOCK_SIZE, torch.float32, torch.device("cpu"), 1)
    tables = [[5, 2, 7], [0], [9, 3]]
    for starts, lengths in (([0, 0], [19, 1]), ([19, 1, 0], [1, 1, 25])):
        batch = PagedBatch.build(starts, lengths, tables[: len(starts)], block_size=toy.BLOCK_SIZE, device=torch.device("cpu"))
        steps = zip(prompts, starts, lengths, strict=False)
        ids = [token for prompt, start, length in steps for token in prompt[start : start + length]]
        hidden = model.forward(torch.tensor(ids), batch, caches)

    torch.testing.assert_close(model.logits(hidden[[0, 1, 26]]), torch.stack(alone), atol=1e-5, rtol=1e-5)
