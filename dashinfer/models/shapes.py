"""The tensors a checkpoint of a decoder has: Hugging Face's names, and the shapes that its config implies. Knows no torch."""

import math

from dashinfer.models.config import ModelConfig
from dashinfer.models.stage import Stage

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


ALL = Stage()


def tensor_shapes(config: ModelConfig, stage: Stage = ALL) -> dict[str, tuple[int, ...]]:
    """Name to shape of what a stage holds, in the order of the layers. Matrices are [outputs, inputs]."""
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    linears = (
        ("self_attn.q_proj", queries, hidden, config.qkv_bias),
        ("self_attn.k_proj", keys, hidden, config.qkv_bias),
        ("self_attn.v_proj", keys, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, queries, config.output_bias),
        ("mlp.gate_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.up_proj", intermediate, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, intermediate, config.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {}
    if stage.first or (stage.last and config.tie_word_embeddings):
        shapes[EMBEDDING] = (config.vocab_size, hidden)
    for layer in stage.layers(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, outputs, inputs, bias in linears:
            shapes[f"{prefix}{name}.weight"] = (outputs, inputs)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (outputs,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
    if stage.last:
        shapes[FINAL_NORM] = (hidden,)
        if not config.tie_word_embeddings:
            shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def head_cost(config: ModelConfig, *, layer_bits: float = 16, head_bits: float = 16) -> float:
    """What the head costs, in layers: bytes of weights that are read for each token. An embedding costs nothing unless it is
    the head: a row of it is read.

    Args:
        layer_bits: of a weight of a layer's matrices.
        head_bits: of a weight of the head.
    """
    shapes = tensor_shapes(config)
    layer = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith("model.layers.0.") and name.endswith("_proj.weight")
    )
    return config.vocab_size * config.hidden_size * head_bits / (layer * layer_bits)
