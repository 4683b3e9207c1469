"""A directory as a model: config.json, tokenizer.json and safetensors, in one file or in shards, as Hugging Face lays them out.

Reads JSON alone. Knows nothing of where the directory comes from.
"""

import json
from pathlib import Path
from typing import Any

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.sources import ModelSource, ReportProgress, TokenizerFiles
from dashinfer.sources.gguf import resolve_gguf
from dashinfer.types import ModelFiles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Files of older quantised models that say how, and the method of those that do not name one.
QUANTIZATION = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def resolve_directory(
    directory: Path, *, load_format: str = "auto", report: ReportProgress, name: str | None = None
) -> ModelSource:
    """The model in a directory; a directory that holds one .gguf model and no config.json stands for that.

    Raises:
        ModelNotFound: a file is missing (it is named).
        UnsupportedModel: weights or tokeniser in a format this build cannot read, or broken JSON.
    """
    directory = directory.absolute()
    if not (directory / "config.json").is_file():
        if (gguf := _only_gguf(directory)) is not None:
            return resolve_gguf(gguf, report=report, name=name)
        raise ModelNotFound(f"{directory} has no config.json, so it is no model directory")
    config = _with_quantization(directory, read_json(directory / "config.json"))
    weights = () if load_format == "dummy" else find_weights(directory)
    return ModelSource(
        files=ModelFiles(name=name or directory.name, format="safetensors", weights=weights, config=config),
        tokenizer=_tokenizer_files(directory, sees="vision_config" in config),
        generation_config=read_json(directory / "generation_config.json", optional=True),
        directory=directory,
    )


def _with_quantization(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config with what a file beside it says of quantisation, if it says nothing itself."""
    if config.get("quantization_config"):
        return config
    for name, method in QUANTIZATION.items():
        if table := read_json(directory / name, optional=True):
            return {**config, "quantization_config": {"quant_method": method, **table}}
    return config


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A file's JSON object; {} for a missing optional file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if optional:
            return {}
        raise ModelNotFound(f"{path.parent} has no {path.name}") from None
    except OSError as error:
        raise ModelNotFound(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} is not a JSON object")
    return value


def indexed_weights(index: Path) -> list[str]:
    """Names of the shards that an index lists, in order."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise UnsupportedModel(f"{index} has no weight_map")
    names = sorted(set(mapping.values()))
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UnsupportedModel(f"{index} names a file outside of its directory: {outside[0]}")
    return names


def find_weights(directory: Path) -> tuple[str, ...]:
    """Paths of the safetensors files: what the index lists, or model.safetensors, or else every one there is.

    Raises:
        ModelNotFound: none, or a shard is missing.
        UnsupportedModel: weights in other formats only.
    """
    if (directory / INDEX).is_file():
        paths = [directory / name for name in indexed_weights(directory / INDEX)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ModelNotFound(f"{directory} lacks {len(missing)} of {len(paths)} weight files, such as {missing[0]}")
    elif (directory / SINGLE).is_file():
        paths = [directory / SINGLE]
    else:
        # "consolidated" is the same weights under the names of Mistral's own library.
        paths = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    if not paths:
        raise _no_weights(directory)
    if pointers := [
        path for path in paths if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs")
    ]:
        raise ModelNotFound(f"{pointers[0]} is a Git LFS pointer and not the weights: run `git lfs pull` in {directory}")
    return tuple(str(path) for path in paths)


def _no_weights(directory: Path) -> ModelNotFound | UnsupportedModel:
    for pattern, kind in (("*.bin", "PyTorch .bin"), ("*.pt", "PyTorch .pt"), ("*.pth", "PyTorch .pth"), ("*.gguf", "GGUF")):
        if found := sorted(directory.glob(pattern)):
            hint = (
                f"give the file itself: --model {found[0]}"
                if kind == "GGUF"
                else "safetensors are needed, since pickle runs code"
            )
            return UnsupportedModel(f"{directory} has {kind} weights only; {hint}")
    return ModelNotFound(f"{directory} has no weights (*.safetensors)")


def _only_gguf(directory: Path) -> Path | None:
    files = sorted(directory.glob("*.gguf"))
    firsts = [path for path in files if "-of-" not in path.name or "-00001-of-" in path.name]
    if len(firsts) > 1:
        raise ModelNotFound(f"{directory} has {len(firsts)} GGUF models; give one of them, such as --model {firsts[0]}")
    return firsts[0] if firsts else None


def _tokenizer_files(directory: Path, *, sees: bool) -> TokenizerFiles:
    if not (directory / "tokenizer.json").is_file():
        if any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
            raise UnsupportedModel(
                f"{directory} has a tokeniser without a tokenizer.json; transformers writes one: "
                "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
            )
        raise ModelNotFound(f"{directory} has no tokenizer.json")
    config = read_json(directory / "tokenizer_config.json", optional=True)
    names = read_json(directory / "special_tokens_map.json", optional=True)
    return TokenizerFiles(
        directory / "tokenizer.json",
        {**names, **config},
        _chat_template(directory, config, sees=sees),
        named_template(config.get("chat_template"), "tool_use"),
    )


def _chat_template(directory: Path, tokenizer_config: dict[str, Any], *, sees: bool) -> str | None:
    """From the first place of those that transformers has used over the years.

    chat_template.json is of a processor: where the model sees, it goes before the tokeniser's own template, which may know
    text alone.
    """
    own = directory / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"cannot read {own}: {error}") from error
    places = [
        tokenizer_config.get("chat_template"),
        read_json(directory / "chat_template.json", optional=True).get("chat_template"),
    ]
    for templates in reversed(places) if sees else places:
        if (chosen := select_template(templates)) is not None:
            return chosen
    return None


def _by_name(templates: Any) -> Any:
    if isinstance(templates, list):
        return {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
    return templates


def select_template(templates: Any) -> str | None:
    """The one for a plain chat among a `chat_template`: a string, a list of `{"name", "template"}`, or a mapping by name."""
    templates = _by_name(templates)
    if isinstance(templates, dict):
        templates = templates.get("default") or (next(iter(templates.values())) if len(templates) == 1 else None)
    return templates if isinstance(templates, str) else None


def named_template(templates: Any, name: str) -> str | None:
    """The one of a name, where a `chat_template` has several."""
    templates = _by_name(templates)
    found = templates.get(name) if isinstance(templates, dict) else None
    return found if isinstance(found, str) else None
