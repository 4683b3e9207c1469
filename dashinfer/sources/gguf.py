"""A `.gguf` file as a model: configuration, tokeniser and chat template from its metadata.

Owns the translation of metadata to Hugging Face form, and the cache of what was translated, which makes a second start skip
the vocabulary. Reads no weights, but for the few numbers that stand for Llama 3's RoPE scaling.
"""

import hashlib
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.gguf_header import TensorInfo, read_floats, read_header
from dashinfer.sources import ModelSource, ReportProgress, TokenizerFiles
from dashinfer.sources.cache import cache_directory, new_entry
from dashinfer.sources.gguf_tokenizer import CONTROL, adds_bos, tokenizer_json
from dashinfer.types import ModelFiles

_CONVERTER = 1  # counts changes of what is cached

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Control tokens that end a turn or a text wherever they appear.
_END_TOKENS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "</s>"}
)
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def resolve_gguf(path: Path, *, report: ReportProgress, name: str | None = None) -> ModelSource:
    """The model in a file, or in the set of files that a `-00001-of-0000N.gguf` belongs to.

    Raises:
        ModelNotFound: a file is missing or cannot be read.
        UnsupportedModel: no GGUF, cut short, an architecture or tokeniser that cannot be served.
        ConfigurationError: the cache cannot be written to.
    """
    paths = _shards(path.absolute())
    entry = cache_directory() / "gguf" / _identity(paths)
    if not ((entry / "source.json").is_file() and (entry / "tokenizer.json").is_file()):
        report("tokenizer", 0, 1, "")
        shutil.rmtree(entry, ignore_errors=True)  # somebody may have deleted a file of it
        try:
            _convert(paths, entry)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise UnsupportedModel(f"{path} has metadata that makes no sense: {error!r}") from error
        report("tokenizer", 1, 1, "")
    cached = msgspec.json.decode((entry / "source.json").read_bytes())
    return ModelSource(
        files=ModelFiles(
            name=name or path.name.removesuffix(".gguf"),
            format="gguf",
            weights=tuple(str(path) for path in paths),
            config=cached["config"],
        ),
        tokenizer=TokenizerFiles(entry / "tokenizer.json", cached["tokenizer_config"], cached["chat_template"]),
        generation_config=cached["generation_config"],
    )


def _shards(path: Path) -> list[Path]:
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    paths = [path.with_name(f"{stem}-{i:05}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    if missing := [shard.name for shard in paths if not shard.is_file()]:
        raise ModelNotFound(f"{path.parent} has not all parts of this model: {', '.join(missing[:3])} missing")
    return paths


def _identity(paths: list[Path]) -> str:
    key = hashlib.sha256(f"converter {_CONVERTER}".encode())
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error
        key.update(f"\n{path}\n{status.st_size} {status.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return key.hexdigest()[:32]


def _convert(paths: list[Path], entry: Path) -> None:
    headers = [read_header(path) for path in paths]
    metadata = headers[0].metadata
    tensors = {name: (path, info) for path, header in zip(paths, headers, strict=True) for name, info in header.tensors.items()}
    source = {
        "config": _config(metadata, tensors, paths[0]),
        "tokenizer_config": _tokenizer_config(metadata),
        "chat_template": metadata.get("tokenizer.chat_template"),
        "generation_config": _generation_config(metadata),
    }
    with new_entry(entry) as directory:
        (directory / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer_json(metadata)))
        (directory / "source.json").write_bytes(msgspec.json.encode(source))


def _config(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[Path, TensorInfo]], path: Path) -> dict[str, Any]:
    """A config.json as Hugging Face would write it."""
    family = metadata.get("general.architecture")
    if family not in _ARCHITECTURES:
        raise UnsupportedModel(f"{path} has the architecture {family!r}; supported are {', '.join(_ARCHITECTURES)}")
    if metadata.get(f"{family}.expert_count"):
        raise UnsupportedModel(f"{path} is a mixture of experts, which is not supported")
    if "token_embd.weight" not in tensors:
        raise UnsupportedModel(f"{path} has no token embeddings; is it a part of a model, or an adapter?")

    def value(key: str, *default: Any) -> Any:
        found = metadata.get(f"{family}.{key}", *default)
        if found is None and not default:
            raise UnsupportedModel(f"{path} lacks the value {family}.{key}")
        if isinstance(found, list):  # some writers give a number for each layer
            if len(set(found)) != 1:
                raise UnsupportedModel(f"{path} has layers that differ in {key}, which is not supported")
            found = found[0]
        return found

    hidden, heads = value("embedding_length"), value("attention.head_count")
    head_dim = value("attention.key_length", hidden // heads)
    if value("attention.value_length", head_dim) != head_dim or value("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModel(f"{path} has attention heads of unequal sizes or RoPE on a part of them, which is not supported")
    config = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "vocab_size": tensors["token_embd.weight"][1].shape[1],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if window := value("attention.sliding_window", 0):
        config |= {"sliding_window": window, "use_sliding_window": True}
    if scaling := _rope_scaling(value, tensors, config, path):
        config["rope_scaling"] = scaling
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[name] = token
    return config


def _rope_scaling(
    value: Any, tensors: Mapping[str, tuple[Path, TensorInfo]], config: Mapping[str, Any], path: Path
) -> dict[str, Any] | None:
    if "rope_freqs.weight" in tensors:
        return _llama3_scaling(*tensors["rope_freqs.weight"], config, path)
    kind = value("rope.scaling.type", "none")
    factor = value("rope.scaling.factor", None) or value("rope.scale_linear", None)
    if factor is None or factor == 1 or kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = value("rope.scaling.original_context_length", config["max_position_embeddings"])
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModel(f"{path} scales RoPE by {kind!r}, which is not supported; none, linear, yarn and llama3 are")


def _llama3_scaling(where: Path, info: TensorInfo, config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """GGUF keeps the divisor of each frequency; Llama 3's rule is found again from the greatest, and checked."""
    if info.type != 0:
        raise UnsupportedModel(f"{path} has RoPE factors that are not F32, which is not supported")
    divisors = read_floats(where, info)
    dimensions, factor = config["head_dim"], max(divisors, default=1.0)
    low, high, original = _LLAMA3.values()
    expected = []
    for i in range(0, dimensions, 2):
        turns = original / (2 * math.pi * config["rope_theta"] ** (i / dimensions))  # within the original context
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        expected.append(1 / ((1 - smooth) / factor + smooth))
    close = len(divisors) == len(expected) and all(
        math.isclose(a, b, rel_tol=1e-3) for a, b in zip(divisors, expected, strict=True)
    )
    if not close:
        raise UnsupportedModel(f"{path} scales RoPE in a way of its own, which is not supported")
    return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3}


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    config: dict[str, Any] = {"add_bos_token": adds_bos(metadata)}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and token < len(tokens):
            config[f"{name}_token"] = tokens[token]
    return config


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults where the file has them, and every token that ends a turn."""
    names = {
        "temp": "temperature",
        "top_k": "top_k",
        "top_p": "top_p",
        "min_p": "min_p",
        "penalty_repeat": "repetition_penalty",
    }
    found = {name: metadata.get(f"general.sampling.{key}") for key, name in names.items()}
    config: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    tokens, types = metadata.get("tokenizer.ggml.tokens") or [], metadata.get("tokenizer.ggml.token_type") or []
    ends = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")} - {None}
    ends |= {i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == CONTROL and token in _END_TOKENS}
    if ends:
        config["eos_token_id"] = sorted(ends)
    return config
