"""What the server runs on: finding the model, its text side and its engine. One seam, so that it can be tested without them.

Nothing is imported before it is needed: what starts the worker comes first, the rest while the worker loads.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.api import EngineAPI
from dashinfer.errors import UnsupportedModel
from dashinfer.serving.service import TextModel
from dashinfer.sources import ModelSource, ReportProgress
from dashinfer.types import ModelFiles, Progress, Ready


class RunnableEngine(EngineAPI, Protocol):
    """An engine as the one who starts and ends it sees it."""

    async def run(self, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled. Raises StartupError where loading fails and WorkerError where a worker is lost."""
        ...

    def begin_drain(self) -> None: ...

    async def drained(self) -> None: ...


class Backend(Protocol):
    def resolve(self, config: ServerConfig, report: ReportProgress) -> ModelSource:
        """Find the model. Blocking; called in a thread."""
        ...

    def engine(self, config: ServerConfig, files: ModelFiles, on_progress: Callable[[Progress], None]) -> RunnableEngine: ...

    def text(self, source: ModelSource) -> TextModel:
        """The text side. Blocking; called in a thread while the engine loads."""
        ...


def _check(config: ServerConfig, model: Mapping[str, Any]) -> None:
    """The worker's own checks of a config.json, here as well: before weights are fetched.

    Raises:
        UnsupportedModel, ConfigurationError: the model, or --max-length or --quant-type with it, cannot be served.
    """
    from dashinfer.models.config import ModelConfig
    from dashinfer.models.quantized_config import check_quant_type

    try:
        shape = ModelConfig.from_hf(model)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UnsupportedModel(f"config.json makes no sense: {error!r}") from error
    shape.resolve_max_length(config.max_length)
    regroup = config.quant_group_size is not None or config.quantize_head
    check_quant_type(shape.quantization, config.model, config.quant_type, regroup=regroup)


class ModelBackend:
    """The real one."""

    def resolve(self, config: ServerConfig, report: ReportProgress) -> ModelSource:
        from dashinfer.sources.resolve import resolve

        return resolve(config.model, load_format=config.load_format, report=report, check=partial(_check, config))

    def engine(self, config: ServerConfig, files: ModelFiles, on_progress: Callable[[Progress], None]) -> RunnableEngine:
        from dashinfer.engine.engine import Engine

        return Engine(config, files, on_progress=on_progress)

    def text(self, source: ModelSource) -> TextModel:
        from dashinfer.text.chat_template import ChatTemplate
        from dashinfer.text.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_source(source)
        template = ChatTemplate.from_files(source.tokenizer, tokenizer.special_tokens)
        return TextModel(tokenizer, template, source.generation_config)
