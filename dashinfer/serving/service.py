"""What the routes share: the settings, the engine and the text side once they are there, and how the server is doing.

One object a process. Owns the answer to "can a request be served now?"; knows nothing of HTTP or of what an engine does.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.api import EngineAPI, EngineState
from dashinfer.errors import ConfigurationError, EngineUnavailable, ModelNotServed, QueueFull
from dashinfer.guidance.compiler import Compiler
from dashinfer.guidance.guide import Grammar
from dashinfer.guidance.spec import Constraint
from dashinfer.serving import log
from dashinfer.serving.context import request_id
from dashinfer.serving.metrics import Metrics

if TYPE_CHECKING:
    from dashinfer.serving.tracing import Tracing
    from dashinfer.text.chat_template import ChatTemplate
    from dashinfer.text.reasoning import ReasoningFormat
    from dashinfer.text.tokenizer import Tokenizer
    from dashinfer.text.tools.formats import ToolFormat
    from dashinfer.vision.intake import Intake
    from dashinfer.vision.model import VisionModel

T = TypeVar("T")

INLINE_BYTES = 4096  # a body up to this size is prepared on the event loop, in about a millisecond

_WHY_NOT = {
    "loading": "the model is still loading",
    "draining": "the server is shutting down",
    "failed": "the engine has failed; see the server's log",
}


@dataclass(frozen=True)
class TextModel:
    """The parent's side of a model: everything between messages and what the engine takes. Safe to share between threads.

    Attributes:
        vision: how it sees; None where it is served without that.
        tools: how it writes calls; None where that is not known.
        reasoning: how it marks its thinking; None where it does not think, or nobody wants to know.
    """

    tokenizer: "Tokenizer"
    template: "ChatTemplate"
    generation_config: Mapping[str, Any]
    vision: "VisionModel | None" = None
    tools: "ToolFormat | None" = None
    reasoning: "ReasoningFormat | None" = None


class Service:
    """The state behind the routes.

    Attributes:
        config: the settings.
        created: when the server started, in seconds since 1970.
        in_flight: requests that are being answered.
        failure: what ended the engine, as one line, or None.
        metrics: what is measured.
        tracing: where spans of requests go; None where nobody wants any.
        reload_keys: reads the file with the keys again.
        intake: takes images and videos; None before the model is loaded, and for one that sees none.
    """

    def __init__(self, config: ServerConfig, *, version: str) -> None:
        self.config = config
        self.version = version
        self.created = int(time.time())
        self.in_flight = 0
        self.failure: str | None = None
        # A few at a time: long prompts must not take every core from the model.
        self.thread_limiter = trio.CapacityLimiter(2)
        self.intake: Intake | None = None
        self._engine: EngineAPI | None = None
        self._text: TextModel | None = None
        self._compiler: Compiler | None = None
        self._draining = False
        self._idle = trio.Event()
        self._idle.set()
        self.system_fingerprint = ""
        self.metrics = Metrics(config.model_name)
        self.tracing: Tracing | None = None
        self.reload_keys: Callable[[], None] = lambda: None

    def ready(self, engine: EngineAPI, text: TextModel) -> None:
        """From now on requests are served."""
        assert engine.info is not None, "an engine that is ready knows its model"
        self._engine = self.metrics.measure(
            engine,
            prefix_cache=not self.config.disable_prefix_cache,
            on_prompt=partial(_log_prompt, text) if self.config.log_prompts else None,
        )
        self._text = text
        self._compiler = Compiler(text.tokenizer, engine.info.vocab_size, max_waiting=self.config.max_queue)
        if text.vision is not None:
            self.intake = _make_intake(self.config, text.vision)
        info = engine.info
        built_from = [self.version, self.config.model_name, info.architecture, info.data_type, info.device]
        if info.kv_cache_dtype != "auto":
            built_from.append(info.kv_cache_dtype)
        if info.mode == "vlm":
            built_from.append(f"vlm, {info.vision_engine}")
        config = self.config
        if config.quant_type is not None:
            built_from.append(f"{config.quant_type}, {config.quant_group_size}, {config.quantize_head}")
        self.system_fingerprint = "fp_" + hashlib.sha256("|".join(built_from).encode()).hexdigest()[:10]

    def open_tracing(self) -> None:
        """From now on requests are traced, if the settings say so.

        Raises:
            ConfigurationError: packages are missing, or a variable of OpenTelemetry's SDK has a value that it cannot use.
        """
        if (endpoint := self.config.otlp_traces_endpoint) is None:
            return
        try:
            from dashinfer.serving.tracing import open_tracing
        except ImportError as error:
            raise ConfigurationError(f'--otlp-traces-endpoint: {error}; run: pip install "dashinfer[otel]"') from error
        self.tracing = open_tracing(endpoint, model=self.config.model_name, version=self.version)

    async def close_tracing(self) -> None:
        """Send the spans that are left. Takes a bounded time, and is not cut short by a cancellation."""
        if self.tracing is not None:
            await self.tracing.close()

    def begin_drain(self) -> None:
        """From now on new requests are refused."""
        self._draining = True

    def fail(self, reason: str) -> None:
        """The engine is gone."""
        self.failure = reason

    @property
    def state(self) -> EngineState:
        if self.failure is not None:
            return "failed"
        if self._draining:
            return "draining"
        return "loading" if self._engine is None else self._engine.state

    @property
    def mode(self) -> str | None:
        """`llm` or `vlm`; None while it is not known."""
        return self._engine.info.mode if self._engine is not None and self._engine.info is not None else None

    def require(self) -> tuple[EngineAPI, TextModel]:
        """The engine and the text side.

        Raises:
            EngineUnavailable: loading, draining or failed.
        """
        if (state := self.state) not in ("ready", "recovering"):
            raise EngineUnavailable(_WHY_NOT[state])
        assert self._engine is not None, "ready without an engine"
        assert self._text is not None, "ready without a tokenizer"
        return self._engine, self._text

    async def compile(self, constraint: Constraint) -> Grammar:
        """What the engine takes for it.

        Raises:
            InvalidRequest: it cannot be followed.
            QueueFull: too many requests wait for their grammars.
        """
        assert self._compiler is not None, "ready without a tokenizer"
        return await self._compiler.compile(constraint)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotServed where a request names another model than the one that is served; None names none."""
        if name not in (None, self.config.model_name, self.config.model):
            raise ModelNotServed(
                f"the model {name[:200]!r} is not served here; this server has {self.config.model_name!r}", param="model"
            )

    async def off_the_loop(self, size: int, work: Callable[[], T]) -> T:
        """Runs what may take long, in a thread if it does.

        Args:
            size: of the request's body, in bytes.

        Raises:
            QueueFull: as many requests wait for a thread as may.
        """
        if size <= INLINE_BYTES:
            return work()
        if (waiting := self.thread_limiter.statistics().tasks_waiting) >= self.config.max_queue:
            raise QueueFull(f"{waiting} long requests are waiting already; try again later")
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self.thread_limiter)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request for as long as it is being answered."""
        self.in_flight += 1
        if self._idle.is_set():
            self._idle = trio.Event()
        try:
            yield
        finally:
            self.in_flight -= 1
            if self.in_flight == 0:
                self._idle.set()

    async def idle(self) -> None:
        """Returns once no request is being answered."""
        while self.in_flight:
            await self._idle.wait()


def _log_prompt(text: TextModel, prompt: list[int]) -> None:
    log.log_prompt(request_id.get(), text.tokenizer.decode(prompt, skip_special_tokens=False))


def _make_intake(config: ServerConfig, vision: "VisionModel") -> "Intake":
    from dashinfer.vision.intake import Intake
    from dashinfer.vision.model import media_policy

    return Intake(vision, media_policy(config), max_waiting=config.max_queue)
