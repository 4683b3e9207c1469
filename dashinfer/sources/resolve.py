"""`resolve`: from what the user typed after `--model` to a `ModelSource`.

Owns the choice between the kinds of sources; each kind has a file of its own. Knows nothing of what the models are.
"""

import os
import re
from pathlib import Path

from dashinfer.errors import ModelNotFound, UnsupportedModel
from dashinfer.sources import CheckSource, ModelSource, ReportProgress
from dashinfer.sources.demo import resolve_demo
from dashinfer.sources.demo_vlm import resolve_demo_vlm
from dashinfer.sources.gguf import resolve_gguf
from dashinfer.sources.hub import resolve_hub
from dashinfer.sources.local import resolve_directory

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def _silent(stage: str, done: int, total: int, unit: str) -> None:
    """Progress that nobody wants to see."""


def _any(source: ModelSource) -> None:
    """Whatever the model is."""


def resolve(
    model: str, *, load_format: str = "auto", report: ReportProgress = _silent, check: CheckSource = _any
) -> ModelSource:
    """Find, and where needed fetch, the model's files. Synchronous and blocking; KeyboardInterrupt goes through.

    A file or directory goes before a Hugging Face ID of the same name. `load_format="dummy"` needs no safetensors weights and
    fetches none. `report(stage, done, total, unit)` gets the stages "download" and "verify", in bytes, and "tokenizer".
    `check(source)` sees the configuration before weights are fetched from the Hub, and may raise.

    Raises:
        ModelNotFound: no such file, directory or repository, no access to it, or no network.
        UnsupportedModel: the files are there but in a form this build cannot serve.
        ConfigurationError: the cache directory cannot be written to.
    """
    path = Path(os.path.expanduser(model))  # unlike Path's own, no error for a user who is not known
    if model not in ("demo", "demo-vlm") and not path.exists() and _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return resolve_hub(model, load_format=load_format, report=report, check=check)
    source = _resolve_local(model, path, load_format=load_format, report=report)
    check(source)
    return source


def _resolve_local(model: str, path: Path, *, load_format: str, report: ReportProgress) -> ModelSource:
    if model == "demo":
        return resolve_demo(report=report)
    if model == "demo-vlm":
        return resolve_demo_vlm(load_format=load_format, report=report)
    if path.is_dir():
        return resolve_directory(path, load_format=load_format, report=report)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModel(f"{model} is not named .gguf; for safetensors, give the directory that holds them")
        return resolve_gguf(path, report=report)
    if model.startswith((".", "~")) or "/" in model or "\\" in model or path.suffix in (".gguf", ".safetensors"):
        raise ModelNotFound(f"{model}: no such file or directory")
    raise ModelNotFound(
        f"{model!r} is neither a path nor a Hugging Face ID such as Qwen/Qwen2.5-0.5B-Instruct; "
        "for a first try, use --model demo, or demo-vlm for one that sees"
    )
