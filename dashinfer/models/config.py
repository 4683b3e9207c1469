"""A model's shape, read from a Hugging Face config. What this build cannot serve is refused here, by name.

Knows the families and how each reads its config; knows no torch, so that a refusal takes milliseconds. A key that a file leaves
out has the value that transformers gives it for that family.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dashinfer.errors import ConfigurationError, UnsupportedModel
from dashinfer.models.quantized_config import CheckpointQuantization, read_quantization
from dashinfer.models.rope_config import RopeConfig

Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"
}  # fmt: skip
_DEFAULT_MAX_LENGTH = 8192


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Where the families differ: `None` for a bias means that `attention_bias` says."""

    max_position_embeddings: int
    num_kv_heads: int | None = None
    head_dim: int | None = None  # None: hidden_size / heads
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool = False  # whether `mlp_bias` is looked at
    qk_norm: bool = False
    windows: Literal["none", "all", "upper"] = "none"  # layers that see `sliding_window` tokens only
    window: int | None = None
    max_window_layers: int = 28
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope: tuple[tuple[int, int, int], bool] | None = None  # sections, and whether they are interleaved


_QWEN = {"max_position_embeddings": 32768, "num_kv_heads": 32, "windows": "upper", "window": 4096}
_FAMILIES = {
    "LlamaForCausalLM": _Family(max_position_embeddings=2048, mlp_bias=True),
    "MistralForCausalLM": _Family(
        max_position_embeddings=131072, num_kv_heads=8, qkv_bias=False, output_bias=False, windows="all", window=4096
    ),
    "Qwen2ForCausalLM": _Family(**_QWEN, qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": _Family(**_QWEN, head_dim=128, qk_norm=True),
}
_QWEN2_VL = _Family(
    **(_QWEN | {"num_kv_heads": 8, "max_window_layers": 80}),
    qkv_bias=True,
    output_bias=False,
    norm_eps=1e-5,
    rope_theta=1e6,
    mrope=((16, 24, 24), False),
)
# Decoders of vision-language models.
_VISION_FAMILIES = {
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    "Qwen3VLForConditionalGeneration": _Family(
        max_position_embeddings=128000,
        num_kv_heads=32,
        head_dim=128,
        qk_norm=True,
        rope_theta=5e5,
        mrope=((24, 20, 20), True),
    ),
}
_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape. Sizes are of the whole model, before it is split over ranks; lengths are in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: Activation
    norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]  # for each layer: how many last tokens, itself included, a token sees; None: all
    rope: RopeConfig
    max_positions: int  # the longest sequence that can be asked for
    native_positions: int  # the longest one that is served without asking
    quantization: CheckpointQuantization | None = None  # of the linear layers in the checkpoint

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, vision: bool = False) -> "ModelConfig":
        """From a config.json's contents.

        Args:
            vision: take vision-language models too, of which this is the decoder.

        Raises:
            UnsupportedModel: an architecture, quantisation or setting that cannot be served, or a value that makes no sense.
        """
        architecture = _architecture(config, vision)
        family = _FAMILIES.get(architecture) or _VISION_FAMILIES[architecture]
        quantization = read_quantization(config.get("quantization_config"))
        if architecture in _VISION_FAMILIES:
            config = text_config(config)
        hidden_size = read_count(config, "hidden_size")
        num_heads = read_count(config, "num_attention_heads")
        num_kv_heads = read_count(config, "num_key_value_heads", family.num_kv_heads or num_heads, null=num_heads)
        num_layers = read_count(config, "num_hidden_layers")
        if num_heads % num_kv_heads:
            raise UnsupportedModel(
                f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly"
            )
        if config.get("head_dim") is None and family.head_dim is None and hidden_size % num_heads:
            raise UnsupportedModel(f"config.json: hidden_size {hidden_size} is no multiple of the {num_heads} attention heads")
        head_dim = read_count(config, "head_dim", family.head_dim or hidden_size // num_heads, null=hidden_size // num_heads)
        activation = config.get("hidden_act", "silu")
        if activation not in _ACTIVATIONS:
            raise UnsupportedModel(
                f"config.json: the activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
            )
        positions = read_count(config, "max_position_embeddings", family.max_position_embeddings)
        rope = RopeConfig.from_hf(
            config,
            head_dim=head_dim,
            max_position_embeddings=positions,
            default_theta=family.rope_theta,
            default_mrope=family.mrope,
        )
        attention_bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=read_count(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read_count(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            activation=_ACTIVATIONS[activation],
            norm_eps=float(config.get("rms_norm_eps", family.norm_eps)),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=family.mlp_bias and bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            windows=_windows(config, family, num_layers),
            rope=rope,
            max_positions=rope.reach(positions),
            # dynamic scaling changes every rotation, so a model keeps its own length unless a longer one is asked for
            native_positions=positions if rope.kind == "dynamic" else rope.reach(positions),
            quantization=quantization,
        )

    def resolve_max_length(self, requested: int | None) -> int:
        """The longest sequence to serve: as requested, or 8192 tokens, or the model's own limit where that is less.

        Raises:
            ConfigurationError: more was requested than the model has positions for.
        """
        if requested is None:
            return min(_DEFAULT_MAX_LENGTH, self.native_positions)
        if requested > self.max_positions:
            raise ConfigurationError(
                f"--max-length {requested} is more than the {self.max_positions} tokens this model was made for; "
                f"use --max-length {self.max_positions} or less"
            )
        return requested

    def check_world_size(self, world_size: int) -> None:
        """Raises UnsupportedModel, naming the sizes that work, if the model cannot be split over `world_size` ranks."""
        if not self._divides(world_size):
            works = map(str, self.tensor_parallel_sizes())
            raise UnsupportedModel(
                f"--tensor-parallel {world_size} does not divide this model ({self.num_heads} attention heads, "
                f"{self.num_kv_heads} key-value heads, intermediate size {self.intermediate_size}); "
                f"these do: {', '.join(works)}"
            )

    def check_stages(self, count: int) -> None:
        """Raises UnsupportedModel if the model has fewer layers than `count` stages of a pipeline."""
        if count > self.num_layers:
            raise UnsupportedModel(
                f"--pipeline-parallel {count} is more than the {self.num_layers} layers of this model; each stage needs one"
            )

    def tensor_parallel_sizes(self) -> list[int]:
        """How many ranks the model can be split over."""
        return [size for size in range(1, self.num_heads + 1) if self._divides(size)]

    def _divides(self, world_size: int) -> bool:
        ranks_per_kv_head = -(-world_size // self.num_kv_heads)  # at most; heads need not divide, but each rank needs one
        return self.intermediate_size % world_size == 0 and ranks_per_kv_head <= self.num_heads // self.num_kv_heads


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The decoder's part of a vision-language model's config.json: a table of its own, or in older files keys beside others."""
    text = dict(config.get("text_config") or config)
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    return text


def _architecture(config: Mapping[str, Any], vision: bool) -> str:
    names = config.get("architectures") or [_BY_MODEL_TYPE.get(config.get("model_type", ""))]
    name = names[0]
    if name is None:
        raise UnsupportedModel("config.json names no architecture, and its model_type is none that is known")
    if vision and name in _VISION_FAMILIES:
        return name
    if "vision_config" in config or "VL" in name or "Vision" in name or "Llava" in name:
        reason = f"supported are {', '.join(_VISION_FAMILIES)}" if vision else "vision is not supported yet"
        raise UnsupportedModel(f"{name} is a vision-language model; {reason}")
    if name not in _FAMILIES:
        raise UnsupportedModel(f"the architecture {name} is not supported; supported are {', '.join(_FAMILIES)}")
    return name


def read_count(config: Mapping[str, Any], key: str, default: int | None = None, *, null: int | None = None) -> int:
    """A positive integer; `default` where the key is missing, `null` where its value is null."""
    value = config.get(key, default)
    if value is None:
        value = default if null is None else null
    if value is None:
        raise UnsupportedModel(f"config.json has no {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"config.json: {key} is {value!r}, not a positive integer")
    return value


def _windows(config: Mapping[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows == "none" or config.get("sliding_window", family.window) is None:
        return (None,) * num_layers
    window = read_count(config, "sliding_window", family.window)
    if family.windows == "all":
        return (window,) * num_layers
    if not config.get("use_sliding_window", False):
        return (None,) * num_layers
    if (layer_types := config.get("layer_types")) is not None:
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown or len(layer_types) != num_layers:
            raise UnsupportedModel(
                f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers"
                if not unknown
                else f"config.json: layers of the type {sorted(unknown)[0]!r} are not supported"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = config.get("max_window_layers", family.max_window_layers)
    return tuple(window if layer >= first else None for layer in range(num_layers))
