"""Finding a model's files: a Hugging Face ID, a local directory, a .gguf file, `demo` or `demo-vlm`.

Runs in the parent, so it never imports torch. `resolve` returns where the weights lie, the configuration in Hugging Face
form, and what the text layer needs; it reads no weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dashinfer.types import ModelFiles

# (stage, done, total, unit): total is 0 while it is unknown, unit "B" for bytes
ReportProgress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TokenizerFiles:
    """What `dashinfer.text` builds a tokeniser and a chat template from."""

    tokenizer_json: Path  # the `tokenizers` library's format
    tokenizer_config: dict[str, Any] = field(default_factory=dict)  # tokenizer_config.json: special tokens, add_bos_token ...
    chat_template: str | None = None
    tool_template: str | None = None  # for chats with tools, where a model has another one for them


@dataclass(frozen=True)
class ModelSource:
    """A resolved model."""

    files: ModelFiles
    tokenizer: TokenizerFiles
    generation_config: dict[str, Any] = field(default_factory=dict)  # generation_config.json, empty where there is none
    directory: Path | None = None  # where config.json and its like lie; None for a .gguf file


# Raises where a model cannot be served. It sees the source without weights, before they are fetched.
CheckSource = Callable[[ModelSource], None]
