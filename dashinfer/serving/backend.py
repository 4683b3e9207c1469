"""What the server runs on: finding the model, its text side and its engine. One seam, so that it can be tested without them.

Nothing is imported before it is needed: what starts the worker comes first, the rest while the worker loads.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.api import EngineAPI
from dashinfer.serving.detect import check, load_vision
from dashinfer.serving.service import TextModel
from dashinfer.sources import ModelSource, ReportProgress
from dashinfer.types import Progress, Ready

if TYPE_CHECKING:
    from dashinfer.cluster.hub import Hub


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

    def engine(
        self, config: ServerConfig, source: ModelSource, on_progress: Callable[[Progress], None], hub: "Hub | None" = None
    ) -> RunnableEngine:
        """`hub`: has the workers on other machines; given where there are some."""
        ...

    def text(self, config: ServerConfig, source: ModelSource) -> TextModel:
        """The text side, with what is needed to see. Blocking; called in a thread while the engine loads."""
        ...


class ModelBackend:
    """The real one."""

    def resolve(self, config: ServerConfig, report: ReportProgress) -> ModelSource:
        from dashinfer.sources.resolve import resolve

        return resolve(config.model, load_format=config.load_format, report=report, check=partial(check, config))

    def engine(
        self, config: ServerConfig, source: ModelSource, on_progress: Callable[[Progress], None], hub: "Hub | None" = None
    ) -> RunnableEngine:
        from dashinfer.engine.engine import Engine
        from dashinfer.worker.processes import Template
        from dashinfer.worker.supervisor import WorkerGroup

        template = Template()
        vision = load_vision(config, source)
        pixel_values = b"" if vision is None else vision.pixel_values

        def make(replica: int, on_progress: Callable[[Progress], None]) -> Engine:
            if hub is None:
                make_workers = partial(WorkerGroup, template=template, heartbeat_timeout=config.heartbeat_timeout)
            else:
                make_workers = partial(hub.workers, replica=replica, template=template)
            return Engine(
                config,
                source.files,
                on_progress=on_progress,
                make_workers=make_workers,
                within=template,
                pixel_values=pixel_values,
                replica=replica,
            )

        if config.data_parallel == 1:
            return make(0, on_progress)
        from dashinfer.engine.replicas import Replicas, SlowestProgress

        progress = SlowestProgress(config.data_parallel, on_progress)
        engines = [make(number, progress.of(number)) for number in range(config.data_parallel)]
        return Replicas(engines, max_queue=config.max_queue, prefix_cache=not config.disable_prefix_cache)

    def text(self, config: ServerConfig, source: ModelSource) -> TextModel:
        from dashinfer.text.chat_template import ChatTemplate
        from dashinfer.text.reasoning import reasoning_format
        from dashinfer.text.tokenizer import Tokenizer
        from dashinfer.text.tools.formats import tool_format

        tokenizer = Tokenizer.from_source(source)
        template = ChatTemplate.from_files(source.tokenizer, tokenizer.special_tokens)
        vision = load_vision(config, source)
        if vision is not None:
            import dashinfer.vision.prompt  # noqa: F401 - and NumPy with it, here because this is a thread
        tools = tool_format(config.tool_call_parser, template.for_tools.source, tokenizer.marker_id)
        reasoning = reasoning_format(config.reasoning_parser, template.source, tokenizer.marker_id)
        return TextModel(tokenizer, template, source.generation_config, vision, tools, reasoning)
