"""What the server measures of itself, for Prometheus: latencies, tokens, how requests end, and the engine's own counts.

`Metrics` holds plain numbers, which become Prometheus families when somebody asks for them, so that a token costs an addition
or two. `MeasuredEngine` stands before an engine and sees every request go through, whichever route it came by; it tells the
request's trace too, if there is one. Names are those of vLLM's metrics where the meaning is the same, with the prefix
`dashinfer:`. Nothing of a request's content is kept.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dashinfer.engine.api import EngineAPI, EngineState, EngineStats, Generation, TokenOutput
from dashinfer.serving.context import arrival, lease, trace, trace_failure
from dashinfer.types import Ready, SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from prometheus_client.registry import Metric

    from dashinfer.serving.tracing import GenerationTrace

PREFIX = "dashinfer:"


def _steps(first: float, last: float) -> tuple[float, ...]:
    """1, 2.5, 5 times powers of ten, from `first` to `last`."""
    every = [float(f"{digit}e{power}") for power in range(-4, 7) for digit in (1, 2.5, 5)]
    return tuple(value for value in every if first <= value <= last)


class Histogram:
    """Counts of values up to each of `bounds`, and beyond them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and how many values are not above it, as Prometheus has them."""
        total, found = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics:
    """The numbers of one server.

    Attributes:
        routes: paths that are told apart in the counts of HTTP requests; the rest is `other`.
    """

    def __init__(self, model: str) -> None:
        self.routes: frozenset[str] = frozenset()
        self.first_token = Histogram(_steps(0.001, 1000))
        self.between_tokens = Histogram(_steps(0.0005, 50))
        self.end_to_end = Histogram(_steps(0.01, 5000))
        self.queued = Histogram(_steps(0.001, 1000))
        self.prompt_lengths = Histogram(_steps(1, 1e6))
        self.output_lengths = Histogram(_steps(1, 1e6))
        self.ended: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort", "error"), 0))
        self.answers: Counter[tuple[str, str, str]] = Counter()
        self.prefix_queries = self.prefix_hits = 0
        self._model = model
        self._engine: EngineAPI | None = None

    def measure(
        self, engine: EngineAPI, *, prefix_cache: bool, on_prompt: Callable[[list[int]], None] | None = None
    ) -> "MeasuredEngine":
        """The engine, with all that goes through it measured, and shown to `on_prompt`. Its own counts are told from now on."""
        self._engine = engine
        return MeasuredEngine(engine, self, prefix_cache=prefix_cache, on_prompt=on_prompt)

    def answered(self, method: str, path: str, status: int) -> None:
        """Count an HTTP request that ended. `path` is as the application sees it."""
        method = method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        self.answers[method, path if path in self.routes else "other", str(status)] += 1

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its media type, in the format that an Accept header prefers."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # it asks for a version that is no number
            encode, content_type = choose_encoder("")
        return encode(registry), content_type

    def collect(self) -> Iterator["Metric"]:
        """For prometheus_client's registry."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        stats = self._engine.stats() if self._engine is not None else EngineStats(0, 0, 0, 0, 0, 0, 0, 0)
        names, values = ["model_name"], [self._model]
        gauges: dict[str, tuple[str, float]] = {
            "num_requests_running": ("Sequences that run.", stats.running),
            "num_requests_waiting": ("Sequences that wait for a place to run, preempted ones included.", stats.waiting),
            "kv_cache_usage_perc": (
                "Share of the KV cache that running sequences hold; 1 is all.",
                stats.used_blocks / max(stats.total_blocks, 1),
            ),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=names)
            gauge.add_metric(values, value)
            yield gauge
        counters = {
            "prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "generation_tokens": ("Tokens produced.", stats.generated_tokens),
            "prefix_cache_queries": ("Tokens of prompts that were looked for in the prefix cache.", self.prefix_queries),
            "prefix_cache_hits": ("Tokens of prompts that were found there.", self.prefix_hits),
            "mm_cache_queries": ("Images and videos that were looked for among the embeddings kept.", stats.media_queries),
            "mm_cache_hits": ("Images and videos that were found there.", stats.media_hits),
            "num_preemptions": ("Sequences that had to give up their place.", stats.preemptions),
            "worker_restarts": ("Times that workers were started again after a failure.", stats.restarts),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=names)
            counter.add_metric(values, value)
            yield counter
        ended = CounterMetricFamily(
            PREFIX + "request_success", "Choices by how they ended.", labels=[*names, "finished_reason"]
        )
        for reason, count in self.ended.items():
            ended.add_metric([*values, reason], count)
        yield ended
        answers = CounterMetricFamily(
            PREFIX + "http_requests", "HTTP requests by route and status.", labels=["method", "handler", "status"]
        )
        for labels, count in self.answers.items():
            answers.add_metric(labels, count)
        yield answers
        histograms = {
            "time_to_first_token_seconds": ("From a request's arrival to its first token.", self.first_token),
            "inter_token_latency_seconds": ("Between two tokens of a choice.", self.between_tokens),
            "e2e_request_latency_seconds": ("From a request's arrival to its last token.", self.end_to_end),
            "request_queue_time_seconds": ("From a request's hand-over to the engine to its first step.", self.queued),
            "request_prompt_tokens": ("Tokens of a request's prompt.", self.prompt_lengths),
            "request_generation_tokens": ("Tokens of a choice.", self.output_lengths),
        }
        for name, (text, histogram) in histograms.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=names)
            family.add_metric(values, histogram.buckets(), histogram.sum)
            yield family


class MeasuredEngine:
    """Implements `dashinfer.engine.api.EngineAPI` by another engine."""

    def __init__(
        self, engine: EngineAPI, metrics: Metrics, *, prefix_cache: bool, on_prompt: Callable[[list[int]], None] | None
    ) -> None:
        self._engine, self._metrics, self._prefix_cache, self._on_prompt = engine, metrics, prefix_cache, on_prompt

    @property
    def state(self) -> EngineState:
        return self._engine.state

    @property
    def info(self) -> Ready | None:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def submit(self, prompt: list[int], params: list[SamplingParams], *rest: Any, **named: Any) -> "MeasuredGeneration":
        """As the engine's own."""
        try:
            life = self._engine.submit(prompt, params, *rest, **named)
        except Exception as error:
            trace_failure(error)
            raise
        if self._on_prompt is not None:
            self._on_prompt(prompt)
        return MeasuredGeneration(self._metrics, life, len(prompt), params, prefix_cache=self._prefix_cache)


class MeasuredGeneration:
    """Implements `dashinfer.engine.api.Generation` by another one, and is its `with` block."""

    def __init__(
        self,
        metrics: Metrics,
        life: AbstractContextManager[Generation],
        prompt_tokens: int,
        params: Sequence[SamplingParams],
        *,
        prefix_cache: bool,
    ) -> None:
        self._metrics, self._life = metrics, life
        self._prompt_tokens = prompt_tokens
        self._prefix_cache = prefix_cache
        self._arrival = arrival.get(time.monotonic())
        self._lease = lease.get()
        self._params = params
        self._trace: GenerationTrace | None = None
        self._last = dict.fromkeys(range(len(params)), 0.0)  # when open choices had their last token; 0: none yet
        self._tokens = [0] * len(params)
        self._begun = self._failed = False

    def __enter__(self) -> "MeasuredGeneration":
        self._generation = self._life.__enter__()
        self._metrics.prompt_lengths.observe(self._prompt_tokens)
        if self._lease is not None:
            self._lease.charge(self._prompt_tokens)
        if (traced := trace.get()) is not None:
            self._trace = traced.generation(self._prompt_tokens, self._params)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._metrics.ended["error" if self._failed else "abort"] += len(self._last)
        if self._lease is not None and self._params[0].pooling is None:  # an embedding's token is no answer
            self._lease.charge(sum(self._tokens))
        self._life.__exit__(kind, error, traceback)
        if self._trace is not None:
            self._trace.end(self._generation.queue_time, self._generation.cached_tokens, sum(self._tokens))

    @property
    def cached_tokens(self) -> int:
        return self._generation.cached_tokens

    @property
    def embedding(self) -> bytes | None:
        return self._generation.embedding

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]:
        return self._generation.prompt_logprobs

    @property
    def queue_time(self) -> float | None:
        return self._generation.queue_time

    async def receive(self) -> list[TokenOutput]:
        try:
            outputs = await self._generation.receive()
        except Exception as error:
            self._failed = True
            trace_failure(error)
            raise
        if outputs:
            self._observe(outputs)
        return outputs

    def stop(self, index: int) -> None:
        self._generation.stop(index)
        self._end(index, "stop")

    def _observe(self, outputs: list[TokenOutput]) -> None:
        now = time.monotonic()
        if not self._begun:
            self._begin(now)
        arrived = {0: len(outputs)} if len(self._tokens) == 1 else Counter([output.index for output in outputs])
        for index, count in arrived.items():
            self._tokens[index] += count
            if last := self._last.get(index, 0.0):
                self._metrics.between_tokens.observe((now - last) / count, count)
            elif count > 1:
                self._metrics.between_tokens.observe(0.0, count - 1)
            if index in self._last:
                self._last[index] = now
        for output in outputs:
            if output.finish is not None:
                self._end(output.index, output.finish)

    def _begin(self, now: float) -> None:
        metrics, self._begun = self._metrics, True
        metrics.first_token.observe(now - self._arrival)
        if self._generation.queue_time is not None:
            metrics.queued.observe(self._generation.queue_time)
        if self._prefix_cache:
            metrics.prefix_queries += self._prompt_tokens
            metrics.prefix_hits += self._generation.cached_tokens
        if self._trace is not None:
            self._trace.first_token(now)

    def _end(self, index: int, reason: str) -> None:
        if self._last.pop(index, None) is None:
            return
        self._metrics.ended[reason] += 1
        self._metrics.output_lengths.observe(self._tokens[index])
        if not self._last:
            now = time.monotonic()
            self._metrics.end_to_end.observe(now - self._arrival)
            if self._trace is not None:
                self._trace.last_token(now)
