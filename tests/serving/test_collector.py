"""Traces: what a collector gets, and that it never harms a request or the server's end."""

import logging
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dashinfer.serving import log, tracing
from dashinfer.serving.asgi import Application
from dashinfer.serving.tracing import Tracing, open_tracing

from .collector import collecting
from .conftest import RunServer
from .fake_engine import FakeBackend
from .process import PATIENCE, free_port, running, server_command

pytestmark = pytest.mark.feature("Operations", "OpenTelemetry traces")

MESSAGES = [{"role": "user", "content": "say hello"}]


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def test_a_collector(tmp_path: Path) -> None:
    """Spans of the last requests come too, with the SDK's variables applied."""
    variables = {"SERVICE_NAME": "mine", "EXPORTER_OTLP_HEADERS": "api-key=sk-2", "EXPORTER_OTLP_COMPRESSION": "gzip"}
    environment = {f"OTEL_{name}": value for name, value in variables.items()}
    with (
        collecting() as collector,
        running(server_command(tmp_path, "--otlp-traces-endpoint", collector.url), **environment) as server,
    ):
        server.wait_ready()
        with server.stream("say hello") as pieces:
            server.signal(15)
            "".join(pieces)
        status = server.end()
        path, headers, message = collector.requests.get(timeout=PATIENCE)

    assert (status, path, headers["content-type"], headers["api-key"]) == (0, "/v1/traces", "application/x-protobuf", "sk-2")
    (resource,) = message.resource_spans
    assert attributes(resource.resource.attributes)["service.name"] == "mine"
    (scope,) = resource.scope_spans
    assert sorted(span.name for span in scope.spans) == ["chat demo", "decode", "prefill", "queue"]
    (span,) = [span for span in scope.spans if span.name == "chat demo"]
    assert (scope.scope.name, span.kind, attributes(span.attributes)["gen_ai.usage.output_tokens"]) == ("dashinfer", 2, 6)
    assert "Traceback" not in "\n".join(server.said)


async def test_a_collector_that_is_away(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each span is tried at once, and each try fails."""
    for name, value in {"BSP_SCHEDULE_DELAY": "1", "BSP_MAX_EXPORT_BATCH_SIZE": "1", "EXPORTER_OTLP_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    away = open_tracing(f"http://127.0.0.1:{free_port()}", model="demo", version="0")
    async with run_server(tracing=away) as server:
        answers = [await server.chat("say hello") for _ in range(10)]
        await away.close()

    assert [answer.status_code for answer in answers] == [200] * 10
    complaints = [record for record in caplog.records if "traces: " in record.getMessage()]
    assert len(complaints) == 1
    assert complaints[0].exc_info is None


def test_a_collector_that_never_answers(tmp_path: Path) -> None:
    """It delays the end, but not for long."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variables = {"OTEL_BSP_SCHEDULE_DELAY": "10", "OTEL_EXPORTER_OTLP_TIMEOUT": "60"}
        with running(server_command(tmp_path, "--otlp-traces-endpoint", url), **variables) as server:
            server.wait_ready()
            body = {"model": "demo", "messages": MESSAGES}
            for _ in range(5):
                assert httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=PATIENCE).status_code == 200
            began = time.monotonic()
            server.signal(15)
            status = server.end()
            took = time.monotonic() - began

    assert status == 0
    assert took < tracing.FLUSH + 10  # the SDK itself would wait for 30 s
    assert not [line for line in server.said if "Traceback" in line or "ERROR" in line or "could not stop" in line]


def test_a_start_that_fails(tmp_path: Path) -> None:
    flags = ["--otlp-traces-endpoint", "http://localhost"]
    with running(server_command(tmp_path, *flags), OTEL_BSP_MAX_QUEUE_SIZE="1") as server:
        server.wait_for("error: --otlp-traces-endpoint: a variable OTEL_... cannot be used")
        status = server.end()

    assert status == 2
    assert "Traceback" not in "\n".join(server.said)


def test_complaints_are_few_and_quote_no_request(caplog: pytest.LogCaptureFixture) -> None:
    complaints = tracing._Complaints()
    complaints.take()
    exporter = logging.getLogger("opentelemetry.exporter.otlp")
    try:
        logging.getLogger("opentelemetry.trace.span").warning("of the client: %s", "secret")
        for number in range(3):
            try:
                raise ConnectionError("refused\nthere")
            except ConnectionError:
                exporter.exception("export %d", number)
    finally:
        complaints.leave()
    exporter.warning("elsewhere")

    assert [record.getMessage() for record in caplog.records] == ["traces: export 0: refused there", "elsewhere"]
    assert caplog.records[0].exc_info is None


async def test_the_end_of_spans_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(SimpleSpanProcessor):
        def shutdown(self) -> None:
            released.wait(PATIENCE)

    released = threading.Event()
    monkeypatch.setattr(tracing, "FLUSH", 0.05)
    stuck = Tracing(Stuck(InMemorySpanExporter()), model="demo", version="0")
    try:
        with trio.fail_after(5), trio.CancelScope() as cancelled:
            cancelled.cancel()
            await stuck.close()
    finally:
        released.set()


async def test_behind_another_asgi_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "configure", lambda *_, **__: None)
    monkeypatch.setenv("DASHINFER_MODEL", "never-loads")
    sent: list[str] = []
    send_in, receive = trio.open_memory_channel[Any](2)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def ask(path: str) -> None:
        messages = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

        async def receive_body() -> Any:
            return next(messages, None) or await trio.sleep_forever()

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "scheme": "http", "query_string": b""}
        await app({**scope, "http_version": "1.1"}, receive_body, send)

    with collecting() as collector:
        monkeypatch.setenv("DASHINFER_OTLP_TRACES_ENDPOINT", collector.url)
        app = Application(FakeBackend(tmp_path))
        async with trio.open_nursery() as nursery, send_in:
            send_in.send_nowait({"type": "lifespan.startup"})
            nursery.start_soon(app, {"type": "lifespan"}, receive.receive, send)
            with trio.fail_after(PATIENCE):
                while not sent:
                    await trio.sleep(0.01)
            await ask("/v1/completions")
            send_in.send_nowait({"type": "lifespan.shutdown"})
        _, _, message = collector.requests.get(timeout=PATIENCE)

    assert sent[0] == "lifespan.startup.complete"
    assert sent[-1] == "lifespan.shutdown.complete"
    (span,) = message.resource_spans[0].scope_spans[0].spans
    assert (span.name, attributes(span.attributes)["error.type"]) == ("text_completion", "engine_unavailable")
