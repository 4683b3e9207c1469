"""What becomes of each request as OpenTelemetry spans, which the SDK's own thread sends by OTLP over HTTP.

A request to an endpoint that generates is a server span, below the caller's where the request names that one (W3C trace
context); below it are spans for its times in the queue, in prefill and in decode. Names are those of the conventions for GenAI
and HTTP, and vLLM's for latencies. Text, keys and the messages of errors, which may quote a request, are in none of them.
Only imported where traces are wanted: everybody else knows a `RequestTrace` from `context.trace`, or None in its place.
"""

import logging
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import trio
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dashinfer.errors import ConfigurationError, RequestError
from dashinfer.serving.log import leaves
from dashinfer.types import SamplingParams

logger = logging.getLogger(__name__)

FLUSH = 2.0  # seconds for the spans that are left at the end
COMPLAINTS = 60.0  # seconds from one log line about spans that cannot be sent to the next
MAX_GENERATIONS = 8  # of a request whose phases are spans; what others need is in the request's own span
MAX_REASONS = 128  # of the choices that a span says the end of
DISCONNECTED = "client_disconnected"  # the `error.type` of an answer that nobody waited for

_PROPAGATOR = TraceContextTextMapPropagator()


class Answer(Protocol):
    """What a span tells of an answer."""

    request: Any  # with `stream`

    @property
    def id(self) -> str: ...

    @property
    def finish_reasons(self) -> Sequence[str | None]: ...


def open_tracing(endpoint: str, *, model: str, version: str) -> "Tracing":
    """Send spans to an endpoint; all else is in the SDK's variables, `OTEL_*`.

    Raises:
        ConfigurationError: one of those cannot be used.
    """
    complaints = _Complaints()
    complaints.take()
    try:
        return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), complaints, model=model, version=version)
    except (ValueError, RuntimeError) as error:
        complaints.leave()
        raise ConfigurationError(f"--otlp-traces-endpoint: a variable OTEL_... cannot be used: {error}") from error


class Tracing:
    """Makes the spans of requests, and hands them to `processor` as they end."""

    def __init__(self, processor: SpanProcessor, complaints: "_Complaints | None" = None, *, model: str, version: str) -> None:
        """
        Args:
            complaints: left at the end.
            model: its name in the API.
        """
        resource = Resource({"service.version": version}).merge(Resource.create())
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # no variable names it
            resource = resource.merge(Resource({"service.name": "dashinfer"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("dashinfer", version)
        self._complaints = complaints
        self._model = model

    def begin(
        self, operation: str, route: str, scope: Mapping[str, Any], request_id: str, began: float
    ) -> "RequestTrace | None":
        """The trace of a request; None where it is not sampled.

        Args:
            operation: `gen_ai.operation.name`.
            scope: ASGI's.
            began: in time.monotonic's seconds, as all times here.
        """
        clock = time.time_ns() - time.monotonic_ns()
        span = self._tracer.start_span(
            operation,
            _PROPAGATOR.extract(_trace_headers(scope["headers"]), Context()),
            SpanKind.SERVER,
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "dashinfer",
                "gen_ai.request.id": request_id,
                "http.request.method": scope["method"],
                "http.route": route,
                "url.path": scope["path"],
                "url.scheme": scope.get("scheme", "http"),
                "network.protocol.version": scope.get("http_version", "1.1"),
            },
            start_time=_nanoseconds(clock, began),
        )
        return RequestTrace(self._tracer, span, operation, self._model, clock, began) if span.is_recording() else None

    async def close(self) -> None:
        """Send what is left, for `FLUSH` seconds at most; a cancellation does not cut that short."""
        with trio.move_on_after(FLUSH, shield=True):
            await trio.to_thread.run_sync(self._provider.shutdown, abandon_on_cancel=True)
        if self._complaints is not None:
            self._complaints.leave()


class RequestTrace:
    """One request's server span. Times are in time.monotonic's seconds."""

    def __init__(self, tracer: Tracer, span: Span, operation: str, model: str, clock: int, began: float) -> None:
        """`clock`: nanoseconds that are added to time.monotonic_ns for the time since 1970."""
        self._tracer, self._span, self._operation, self._model = tracer, span, operation, model
        self._clock, self._began = clock, began
        self._context = set_span_in_context(span, Context())
        self._generations: list[GenerationTrace] = []
        self._answer: Answer | None = None
        self._error: BaseException | None = None

    def generation(self, prompt_tokens: int, params: Sequence[SamplingParams]) -> "GenerationTrace":
        """A generation begins, with a choice for each of `params`."""
        if not self._generations:
            self._span.update_name(f"{self._operation} {self._model}")
            self._span.set_attributes({"gen_ai.request.model": self._model, "gen_ai.response.model": self._model})
            if params[0].pooling is None:
                self._span.set_attributes(_sampling(params))
        generation = GenerationTrace(self, len(self._generations), prompt_tokens)
        self._generations.append(generation)
        return generation

    def phase(self, name: str, number: int, begin: float, end: float) -> None:
        """A span below the request's. `number`: of the generation."""
        attributes = {"dashinfer.generation": number}
        start = _nanoseconds(self._clock, begin)
        span = self._tracer.start_span(name, self._context, attributes=attributes, start_time=start)
        span.end(max(start, _nanoseconds(self._clock, end)))

    def answered(self, answer: Answer) -> None:
        """The engine has accepted the request."""
        self._answer = answer

    def failed(self, error: Exception) -> None:
        """The first error is what the request ends with."""
        if self._error is None:
            self._error = leaves(error)[0]

    def end(self, status: int, *, complete: bool) -> None:
        """The request has ended.

        Args:
            status: of HTTP; 0 where none was sent.
            complete: all of the answer was sent.
        """
        span, error = self._span, self._error
        if status:
            span.set_attribute("http.response.status_code", status)
        if error is not None:
            request_error = error if isinstance(error, RequestError) else None
            span.set_attribute("error.type", type(error).__name__ if request_error is None else _kind(request_error))
            if request_error is None or request_error.status >= 500:  # others are the client's, and no fault of a server's
                span.set_status(StatusCode.ERROR)
        elif not complete:
            span.set_attribute("error.type", DISCONNECTED)
        self._tell_generations()
        if self._answer is not None:
            unfinished = "abort" if error is None else "error"
            reasons = [reason or unfinished for reason in self._answer.finish_reasons[:MAX_REASONS]]
            span.set_attribute("gen_ai.response.id", self._answer.id)
            span.set_attribute("gen_ai.response.finish_reasons", reasons)
            span.set_attribute("gen_ai.request.stream", bool(self._answer.request.stream))
        span.end(_nanoseconds(self._clock, time.monotonic()))

    def _tell_generations(self) -> None:
        if not self._generations:
            return
        total = {
            "gen_ai.usage.input_tokens": sum(each.prompt_tokens for each in self._generations),
            "gen_ai.usage.cache_read.input_tokens": sum(each.cached_tokens for each in self._generations),
        }
        if self._operation != "embeddings":
            total["gen_ai.usage.output_tokens"] = sum(each.tokens for each in self._generations)
        self._span.set_attributes(total)
        if (queued := self._generations[0].queue_time) is not None:
            self._span.set_attribute("gen_ai.latency.time_in_queue", queued)
        if self._operation != "embeddings" and (firsts := [each.first for each in self._generations if each.first is not None]):
            seconds = min(firsts) - self._began
            self._span.set_attribute("gen_ai.server.time_to_first_token", seconds)
            self._span.set_attribute("gen_ai.latency.time_to_first_token", seconds)


class GenerationTrace:
    """One prompt's way through the engine.

    Attributes:
        queue_time: seconds; None before the engine computes any of it.
        first: when its first token came, or None.
    """

    def __init__(self, request: RequestTrace, number: int, prompt_tokens: int) -> None:
        self._request, self._number = request, number
        self._began = time.monotonic()
        self._last: float | None = None
        self.prompt_tokens, self.cached_tokens, self.tokens = prompt_tokens, 0, 0
        self.queue_time: float | None = None
        self.first: float | None = None

    def first_token(self, now: float) -> None:
        """Of any choice."""
        self.first = now

    def last_token(self, now: float) -> None:
        """Of the last choice to end."""
        self._last = now

    def end(self, queue_time: float | None, cached_tokens: int, tokens: int) -> None:
        """Nothing more is wanted of it. `tokens`: of all choices."""
        self.queue_time, self.cached_tokens, self.tokens = queue_time, cached_tokens, tokens
        if self._number >= MAX_GENERATIONS:
            return
        end = time.monotonic() if self._last is None else self._last
        first = end if self.first is None else self.first
        computed = first if queue_time is None else min(first, self._began + queue_time)
        self._request.phase("queue", self._number, self._began, computed)
        if queue_time is None:
            return
        self._request.phase("prefill", self._number, computed, first)
        if self.first is not None and tokens > 1:
            self._request.phase("decode", self._number, self.first, end)


class _Complaints(logging.Handler):
    """In the place of the SDK's log: a line now and then, without a traceback, and nothing that quotes a request's headers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._logger = logging.getLogger("opentelemetry")
        self._next = 0.0

    def take(self) -> None:
        self._before = self._logger.handlers, self._logger.propagate
        self._logger.handlers, self._logger.propagate = [self], False

    def leave(self) -> None:
        self._logger.handlers, self._logger.propagate = self._before

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now < self._next or not record.name.startswith(("opentelemetry.sdk.", "opentelemetry.exporter.")):
            return
        self._next = now + COMPLAINTS
        reason = f": {record.exc_info[1]}" if record.exc_info else ""
        logger.warning("traces: %s", " ".join((record.getMessage() + reason).split())[:300])


def _nanoseconds(clock: int, seconds: float) -> int:
    return clock + int(seconds * 1e9)


def _trace_headers(headers: Iterable[tuple[bytes, bytes]]) -> MutableMapping[str, list[str]]:
    """Those of W3C's trace context. More than one parent is none."""
    found: dict[str, list[str]] = {}
    for name, value in headers:
        if name in (b"traceparent", b"tracestate"):
            found.setdefault(name.decode(), []).append(value.decode("latin-1"))
    return found if len(found.get("traceparent", ())) == 1 else {}


def _kind(error: RequestError) -> str:
    """What the client is told that it is, in a word."""
    return error.code or error.type


def _sampling(params: Sequence[SamplingParams]) -> dict[str, int | float]:
    """As resolved from the request, the model's defaults and the room that there is; what is off is left out."""
    first = params[0]
    attributes: dict[str, int | float] = {
        "gen_ai.request.max_tokens": first.max_tokens,
        "gen_ai.request.temperature": first.temperature,
        "gen_ai.request.top_p": first.top_p,
    }
    others = {
        "choice.count": len(params) if len(params) > 1 else 0,
        "top_k": first.top_k,
        "frequency_penalty": first.frequency_penalty,
        "presence_penalty": first.presence_penalty,
    }
    return attributes | {f"gen_ai.request.{name}": value for name, value in others.items() if value}
