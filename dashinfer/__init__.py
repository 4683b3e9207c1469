"""DashInfer: an OpenAI-compatible server for language and vision-language models, and `LLM`, the same without a server."""

import importlib
from typing import Any

__version__ = "3.0.0.dev0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # imported when it is asked for: every worker imports this package, and none needs what `LLM` does
        return importlib.import_module("dashinfer.serving.offline").LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
