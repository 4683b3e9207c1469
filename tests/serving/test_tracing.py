"""Traces: what spans say of requests."""

import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
import trio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError, InternalError
from dashinfer.serving import chat, tracing
from dashinfer.serving.environment import from_environment
from dashinfer.serving.service import Service
from dashinfer.serving.tracing import Tracing

from .conftest import Running, RunServer
from .fake_engine import FullEngine

pytestmark = pytest.mark.feature("Operations", "OpenTelemetry traces")

MESSAGES = [{"role": "user", "content": "say hello"}]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ENDPOINTS = {
    "/v1/chat/completions": ("chat", {"messages": MESSAGES}, "chatcmpl-"),
    "/v1/completions": ("text_completion", {"prompt": "user: say hello"}, "cmpl-"),
    "/v1/responses": ("chat", {"input": "say hello"}, "resp_"),
    "/v1/messages": ("chat", {"messages": MESSAGES, "max_tokens": 50}, "msg_"),
}


class Spans:
    """What was recorded of the requests that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._exporter), model="demo", version="0")

    @property
    def servers(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.SERVER]

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        every = self._exporter.get_finished_spans()
        found = [span for span in every if span.parent is not None and span.parent.span_id == parent.context.span_id]
        return sorted(found, key=lambda span: span.start_time)

    async def only(self, server: Running) -> ReadableSpan:
        """The server span of the only request."""
        await server.service.idle()
        (span,) = self.servers
        return span

    def __str__(self) -> str:
        return "\n".join(span.to_json() for span in self._exporter.get_finished_spans())


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_a_span_for_each_request(run_server: RunServer, spans: Spans, path: str, stream: bool) -> None:
    operation, fields, prefix = ENDPOINTS[path]
    async with run_server(tracing=spans.tracing) as server:
        answer = await server.client.post(
            path, json={"model": "demo", "stream": stream, **fields}, headers={"x-request-id": "mine"}
        )
        span = await spans.only(server)

    assert answer.status_code == 200
    assert (span.name, span.kind, span.status.status_code) == (f"{operation} demo", SpanKind.SERVER, StatusCode.UNSET)
    found = dict(span.attributes)
    prompt = len(server.engine.submitted[0][0])
    assert found.pop("gen_ai.response.id").startswith(prefix)
    assert found["gen_ai.latency.time_to_first_token"] == found.pop("gen_ai.server.time_to_first_token")
    assert 0 < found.pop("gen_ai.latency.time_to_first_token") < 10
    assert found.pop("gen_ai.request.max_tokens") > 10
    assert found == {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "dashinfer",
        "gen_ai.request.id": "mine",
        "gen_ai.request.model": "demo",
        "gen_ai.request.stream": stream,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.model": "demo",
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.cache_read.input_tokens": prompt // 16 * 16,
        "gen_ai.usage.output_tokens": len("hello") + 1,
        "gen_ai.latency.time_in_queue": 0.25,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": path,
        "network.protocol.version": "1.1",
        "url.path": path,
        "url.scheme": "http",
    }
    phases = spans.below(span)
    assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
    assert [phase.end_time for phase in phases[:-1]] == [phase.start_time for phase in phases[1:]]
    assert span.start_time < phases[0].start_time
    assert phases[-1].end_time <= span.end_time
    assert abs(time.time_ns() - span.end_time) < 60e9
    assert "mine" in str(spans)
    assert "hello" not in str(spans)


@pytest.mark.parametrize("ends", ["by itself", "cancelled"])
async def test_a_span_lasts_as_long_as_a_response_in_the_background(run_server: RunServer, spans: Spans, ends: str) -> None:
    async with run_server(tracing=spans.tracing) as server:
        body = {"model": "demo", "input": "wait abc", "background": True}
        id = (await server.client.post("/v1/responses", json=body)).json()["id"]
        await server.engine.until_waiting()
        early = list(spans.servers)
        if ends == "cancelled":
            await server.client.post(f"/v1/responses/{id}/cancel")
        server.engine.release.set()
        span = await spans.only(server)

    assert early == []
    found = dict(span.attributes)
    assert (found["gen_ai.response.id"], found["http.response.status_code"]) == (id, 200)
    reason, tokens = ("stop", 4) if ends == "by itself" else ("abort", 1)
    assert (found["gen_ai.response.finish_reasons"], found["gen_ai.usage.output_tokens"]) == ((reason,), tokens)
    assert "error.type" not in found


async def test_embeddings(run_server: RunServer, spans: Spans) -> None:
    async with run_server(tracing=spans.tracing, max_queue=4) as server:
        await server.client.post("/v1/embeddings", json={"model": "demo", "input": ["secret"] * 20})
        span = await spans.only(server)

    assert span.name == "embeddings demo"
    assert span.attributes["gen_ai.usage.input_tokens"] == 20 * len("secret")
    assert not {"gen_ai.usage.output_tokens", "gen_ai.request.temperature", "gen_ai.response.id"} & set(span.attributes)
    shown = [(phase.name, phase.attributes["dashinfer.generation"]) for phase in spans.below(span)]
    assert sorted(shown) == sorted((name, number) for number in range(tracing.MAX_GENERATIONS) for name in ("queue", "prefill"))
    assert "secret" not in str(spans)


async def test_what_was_asked_for(run_server: RunServer, spans: Spans) -> None:
    fields = {"n": 2, "max_tokens": 3, "temperature": 0.5, "top_p": 0.75, "top_k": 4, "presence_penalty": 0.25, "stop": "el"}
    async with run_server(tracing=spans.tracing) as server:
        await server.chat("say hello", **fields)
        span = await spans.only(server)

    asked = {key.removeprefix("gen_ai.request."): value for key, value in span.attributes.items() if "gen_ai.request" in key}
    assert asked == {
        "choice.count": 2, "id": asked["id"], "max_tokens": 3, "model": "demo", "presence_penalty": 0.25, "stream": False,
        "temperature": 0.5, "top_k": 4, "top_p": 0.75,
    }  # fmt: skip
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop", "stop")


async def test_a_streams_span_ends_with_the_stream(run_server: RunServer, spans: Spans) -> None:
    async with run_server(tracing=spans.tracing) as server:
        async with server.client.stream("POST", "/v1/chat/completions", json=server.body("wait ab", stream=True)) as answer:
            await server.engine.until_waiting()
            released = time.time_ns()
            assert spans.servers == []
            server.engine.release.set()
            await answer.aread()
        span = await spans.only(server)

    assert span.end_time > released
    assert span.attributes["gen_ai.usage.output_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body", "settings", "status", "kind", "failed"),
    [
        ("/v1/chat/completions", {"model": "demo", "messages": "secret"}, {}, 400, "invalid_request_error", False),
        ("/v1/messages", {"model": "demo", "messages": "secret"}, {}, 400, "invalid_request_error", False),
        ("/v1/responses", {"model": "secret", "input": "x"}, {}, 404, "model_not_found", False),
        ("/v1/completions", {"model": "demo", "prompt": "secret" * 800}, {}, 400, "context_length_exceeded", False),
        ("/v1/embeddings", {"model": "demo", "input": "secret"}, {"api_keys": ("sk-1",)}, 401, "invalid_api_key", False),
        ("/v1/completions", {"model": "demo", "prompt": "secret"}, {"engine_type": FullEngine}, 429, "queue_full", False),
        ("/v1/chat/completions", {"model": "demo", "messages": MESSAGES}, {"ready": False}, 503, "engine_unavailable", True),
    ],
)
async def test_requests_that_are_refused(
    run_server: RunServer, spans: Spans, path: str, body: Any, settings: Any, status: int, kind: str, failed: bool
) -> None:
    async with run_server(tracing=spans.tracing, **settings) as server:
        answer = await server.client.post(path, json=body)
        span = await spans.only(server)

    assert (answer.status_code, span.attributes["http.response.status_code"]) == (status, status)
    assert span.attributes["error.type"] == kind
    assert span.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
    assert "secret" not in str(spans)
    assert "sk-1" not in str(spans)


async def test_a_bug_and_a_request_that_the_engine_loses(run_server: RunServer, spans: Spans) -> None:
    async with run_server(tracing=spans.tracing) as server:
        server.engine.lost = RuntimeError("gone")
        await server.chat("say hello")
        span = await spans.only(server)

    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description is None
    assert span.attributes["error.type"] == "RuntimeError"
    assert span.attributes["http.response.status_code"] == 500
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


async def test_a_stream_that_fails(run_server: RunServer, spans: Spans) -> None:
    async with run_server(tracing=spans.tracing) as server:
        async with server.client.stream("POST", "/v1/chat/completions", json=server.body("wait ab", stream=True)) as answer:
            await server.engine.until_waiting()
            server.engine.lost = InternalError("the engine lost this request")
            server.engine.release.set()
            await answer.aread()
        span = await spans.only(server)

    assert "[DONE]" not in answer.text
    assert span.status.status_code is StatusCode.ERROR
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("internal_error", 200)
    assert span.attributes["gen_ai.response.finish_reasons"] == ("error",)


async def test_a_bug_in_a_stream(run_server: RunServer, spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(chat.ChatCompletion, "_encode", fail)
    async with run_server(tracing=spans.tracing) as server:
        with pytest.raises(httpx.RemoteProtocolError):
            await server.chat("say hello", stream=True)
        span = await spans.only(server)

    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "ZeroDivisionError"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves(run_server: RunServer, spans: Spans, stream: bool) -> None:
    async with run_server(tracing=spans.tracing) as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: server.chat("wait ab", stream=stream))
            await server.engine.until_waiting()
            nursery.cancel_scope.cancel()
        await server.engine.until(lambda: server.engine.running == 0)
        span = await spans.only(server)

    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["error.type"] == "client_disconnected"
    assert ("http.response.status_code" in span.attributes) == stream
    assert span.attributes["gen_ai.response.finish_reasons"] == ("abort",)
    assert span.attributes["gen_ai.usage.output_tokens"] == 1
    assert [phase.name for phase in spans.below(span)] == ["queue", "prefill"]


async def test_the_callers_trace(run_server: RunServer, spans: Spans) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    async with run_server(tracing=spans.tracing) as server:
        await server.client.post("/v1/chat/completions", json=server.body("say hi"), headers=headers)
        span = await spans.only(server)

    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.context.trace_state.to_header() == "vendor=1"
    assert {f"{phase.context.trace_id:032x}" for phase in spans.below(span)} == {TRACE}


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "secret")],
        [("traceparent", f"00-{TRACE}-{'0' * 16}-01")],
        [("traceparent", f"ff-{TRACE}-{PARENT}-01")],
        [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("traceparent", f"00-{TRACE}-{PARENT}-01")],
        [("tracestate", "vendor=1")],
    ],
)
async def test_a_parent_that_is_none(run_server: RunServer, spans: Spans, headers: list[tuple[str, str]]) -> None:
    async with run_server(tracing=spans.tracing) as server:
        answer = await server.client.post("/v1/chat/completions", json=server.body("say hi"), headers=headers)
        span = await spans.only(server)

    assert answer.status_code == 200
    assert span.parent is None
    assert f"{span.context.trace_id:032x}" != TRACE


async def test_what_is_not_traced(run_server: RunServer, spans: Spans) -> None:
    async with run_server(tracing=spans.tracing) as server:
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        answer = await server.client.post("/v1/chat/completions", json=server.body("say hi"), headers=unsampled)
        await server.client.get("/v1/chat/completions")
        await server.client.get("/health")
        await server.client.post("/tokenize", json={"prompt": "x"})
        await server.service.idle()

    assert answer.status_code == 200
    assert spans.servers == []


def test_the_endpoint() -> None:
    def parsed(text: str) -> str | None:
        return from_environment({"DASHINFER_MODEL": "m", "DASHINFER_OTLP_TRACES_ENDPOINT": text}).otlp_traces_endpoint

    assert parsed("http://localhost:4318") == parsed("http://localhost:4318/") == "http://localhost:4318/v1/traces"
    assert parsed("https://collector.example/otlp") == "https://collector.example/otlp"
    for text in (
        "localhost:4318",
        "grpc://localhost:4317",
        "http://",
        "http://host:port",
        "http://a b/",
        "http://[::1",
        "http://a/?key=1",
    ):
        with pytest.raises(ConfigurationError, match="write for example http://localhost:4318/v1/traces"):
            parsed(text)
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_HEADERS") as caught:
        parsed("http://user:secret@localhost")
    assert "secret" not in str(caught.value)


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "dashinfer.serving.tracing")
    service = Service(ServerConfig(model="demo", otlp_traces_endpoint="http://localhost:1/v1/traces"), version="0")

    with pytest.raises(ConfigurationError, match=r'pip install "dashinfer\[otel\]"$'):
        service.open_tracing()


def test_off_imports_nothing() -> None:
    program = (
        "import sys; from dashinfer.serving import app, asgi, offline, run; "
        "print([name for name in sys.modules if 'opentelemetry' in name or name.endswith('tracing')])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert said.stdout == "[]\n"
