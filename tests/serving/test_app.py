"""The routes, over HTTP."""

import json
import re
from typing import Any

import httpx
import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.errors import ContextLengthExceeded, QueueFull
from dashinfer.protocol.chat import ChatCompletion, ErrorResponse, ModelList
from dashinfer.protocol.openapi import openapi_document
from dashinfer.serving import app, edge
from dashinfer.serving.service import Service, TextModel

from .conftest import RunServer
from .fake_engine import INFO, FakeEngine


def error_of(response: httpx.Response) -> dict:
    assert response.headers["content-type"] == "application/json"
    return ErrorResponse.model_validate_json(response.content, strict=True).error.model_dump()


@pytest.mark.feature("Endpoints", "API as a document")
def test_every_route_is_documented() -> None:
    service = Service(ServerConfig(model="demo"), version="0")
    document = openapi_document(title="t", version="1", api_keys=False, model="demo")
    documented = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    routes = {
        (method, re.sub(r"<(path:)?(\w+)>", r"{\2}", rule.rule))
        for rule in app.create_app(service).url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }

    assert routes - documented == {("GET", path) for path in ("/", "/chat/{name}", "/docs", "/docs/{name}", "/openapi.json")}
    assert documented <= routes


@pytest.mark.feature("Endpoints", "Models, version, probes")
async def test_health_and_models(run_server: RunServer) -> None:
    async with run_server() as server:
        health = await server.client.get("/health")
        models = await server.client.get("/v1/models")

    assert (health.status_code, health.text) == (200, '{"status":"ok","mode":"llm"}')
    (model,) = ModelList.model_validate_json(models.content).data
    assert (model.id, model.max_model_len) == ("demo", 4096)


async def test_before_the_model_is_loaded(run_server: RunServer) -> None:
    async with run_server(ready=False) as server:
        health = await server.client.get("/health")
        answers = [await server.client.get("/v1/models"), await server.chat("say no", stream=True)]

    assert (health.status_code, health.json()) == (503, {"status": "loading", "mode": None})
    for answer in answers:
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
        assert error_of(answer)["code"] == "engine_unavailable"


async def test_requests_wait_while_workers_start_again(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.state = "recovering"
        health = await server.client.get("/health")
        answer = await server.chat("say yes")
        models = await server.client.get("/v1/models")

    assert (health.status_code, health.json()) == (503, {"status": "recovering", "mode": "llm"})
    assert (answer.status_code, models.status_code) == (200, 200)


async def test_a_failed_engine_shows_at_once(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.state = "failed"
        health = await server.client.get("/health")
        answer = await server.chat("say no")

    assert (health.status_code, health.json()) == (503, {"status": "failed", "mode": "llm"})
    assert answer.status_code == 503


@pytest.mark.feature("Endpoints", "Chat completions, whole or streamed")
async def test_completion(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.chat("say The capital of France is Paris.")
        await server.engine.until(lambda: server.engine.running == 0)

    assert answer.status_code == 200
    completion = ChatCompletion.model_validate_json(answer.content)
    assert completion.choices[0].message.content == "The capital of France is Paris."
    assert completion.choices[0].finish_reason == "stop"
    prompt = len("user: say The capital of France is Paris.") + 1
    assert completion.usage.prompt_tokens == prompt
    assert completion.usage.completion_tokens == len("The capital of France is Paris.") + 1  # and the end of the turn
    assert completion.usage.prompt_tokens_details.cached_tokens == prompt // 16 * 16
    assert server.engine.record[:2] == ["begin", "end"]


async def test_long_prompts_are_prepared_in_a_thread(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.client.post(
            "/v1/chat/completions",
            json=server.body("say yes", metadata={"padding": "a" * 10_000}),
        )

    assert answer.json()["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"nonsense": 1}, "nonsense"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_field(run_server: RunServer, fields: dict, param: str, stream: bool) -> None:
    async with run_server() as server:
        answer = await server.client.post("/v1/chat/completions", json={**server.body("say no", stream=stream), **fields})

    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000])
async def test_body_that_is_no_request(run_server: RunServer, body: bytes) -> None:
    async with run_server() as server:
        answer = await server.client.post("/v1/chat/completions", content=body)

    assert answer.status_code == 400
    assert error_of(answer)["message"]


@pytest.mark.parametrize("length", [5000, 4096 * 256 + 1])
async def test_prompt_without_room(run_server: RunServer, length: int) -> None:
    async with run_server() as server:
        answer = await server.chat("a" * length, stream=True)

    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"


async def test_unknown_model(run_server: RunServer) -> None:
    async with run_server(served_model_name="mine") as server:
        as_served = await server.chat("say yes", model="mine")
        as_typed = await server.chat("say yes", model="demo")
        other = await server.chat("say no", model="gpt-4o", stream=True)

    assert (as_served.status_code, as_served.json()["model"]) == (200, "mine")
    assert (as_typed.status_code, as_typed.json()["model"]) == (200, "mine")
    assert other.status_code == 404
    assert error_of(other)["code"] == "model_not_found"


async def test_unknown_route_and_wrong_method(run_server: RunServer) -> None:
    async with run_server() as server:
        unknown = await server.client.post("/v1/nothing", content=b"x" * 100_000)
        wrong = await server.client.get("/v1/chat/completions")
        deleted = await server.client.delete("/health")
        options = await server.client.options("/v1/chat/completions")
        head = await server.client.head("/health")

    assert unknown.status_code == 404
    assert error_of(unknown)["type"] == "invalid_request_error"
    assert wrong.status_code == deleted.status_code == 405
    assert "POST" in wrong.headers["allow"]
    assert error_of(wrong)["code"] == "method_not_allowed"
    assert options.status_code == 200
    assert "POST" in options.headers["allow"]
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize("chunked", [False, True])
async def test_body_too_large(run_server: RunServer, monkeypatch: pytest.MonkeyPatch, chunked: bool) -> None:
    monkeypatch.setattr(app, "MAX_BODY", 2**20)
    data = b"x" * (8 * 2**20)

    async def pieces():
        yield data

    async with run_server() as server:
        answer = await server.client.post("/v1/chat/completions", content=pieces() if chunked else data)
        after = await server.chat("say still here")

    assert answer.status_code == 413
    assert error_of(answer)["code"] == "payload_too_large"
    assert after.status_code == 200


async def test_a_large_body_that_fits(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.chat("say yes", chat_template_kwargs={"padding": "a" * (7 * 2**20)})

    assert answer.status_code == 200


async def test_a_body_that_nobody_reads_is_not_kept(run_server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    append = app._Request.body_class.append

    def record(self: object, data: bytes) -> None:
        append(self, data)
        kept.append(len(self._data))

    monkeypatch.setattr(app._Request.body_class, "append", record)

    async def pieces():
        for _ in range(64):
            yield b"x" * 2**16

    async with run_server() as server:
        answer = await server.client.post("/v1/nothing", content=pieces())

    assert answer.status_code == 404
    assert kept
    assert max(kept) < app.MAX_OTHER_BODY + 2**17


async def test_those_who_wait_for_a_thread_are_counted(run_server: RunServer) -> None:
    answers = []
    async with run_server(max_queue=1) as server:
        limiter = server.service.thread_limiter

        async def ask() -> None:
            answers.append(await server.chat("say yes", metadata={"padding": "a" * 10_000}))

        await limiter.acquire_on_behalf_of("one")
        await limiter.acquire_on_behalf_of("two")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            nursery.start_soon(ask)
            with trio.fail_after(10):
                while not answers:
                    await trio.lowlevel.checkpoint()
            limiter.release_on_behalf_of("one")
            limiter.release_on_behalf_of("two")

    refused, answered = answers
    assert (refused.status_code, answered.status_code) == (429, 200)
    assert error_of(refused)["code"] == "queue_full"


@pytest.mark.parametrize("stream", [False, True])
async def test_queue_full(run_server: RunServer, stream: bool) -> None:
    async with run_server() as server:
        server.engine.refusal = QueueFull("256 requests wait already")
        answer = await server.chat("say no", stream=stream)

    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert error_of(answer) == {
        "message": "256 requests wait already",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }


async def test_what_the_engine_refuses(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.refusal = ContextLengthExceeded("too long", param="messages")
        answer = await server.chat("say no", stream=True)

    assert answer.status_code == 400
    assert error_of(answer)["param"] == "messages"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_a_500_without_details(run_server: RunServer, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with run_server() as server:
        server.engine.refusal = ZeroDivisionError("secret detail")
        answer = await server.chat("say no", stream=stream)

    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    assert answer.headers["x-request-id"] in error_of(answer)["message"]
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


@pytest.mark.feature("Operations", "Structured logs, request ids")
async def test_request_ids(run_server: RunServer) -> None:
    async with run_server() as server:
        own = await server.client.get("/health", headers={"x-request-id": "abc-123"})
        bad = await server.client.get("/health", headers={"x-request-id": "a b<script>"})
        none = [(await server.client.get("/health")).headers["x-request-id"] for _ in range(2)]

    assert own.headers["x-request-id"] == "abc-123"
    assert bad.headers["x-request-id"].startswith("req-")
    assert len(set(none)) == 2


@pytest.mark.feature("Endpoints", "API as a document")
async def test_docs_need_nothing_from_elsewhere(run_server: RunServer) -> None:
    async with run_server(api_keys=("sk-1",), served_model_name="mine") as server:
        page = await server.client.get("/docs")
        files = {
            name: await server.client.get(f"/docs/{name}") for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js")
        }
        document = await server.client.get("/openapi.json")
        outside = await server.client.get("/docs/../app.py")

    assert "http" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert all(name in page.text and answer.status_code == 200 for name, answer in files.items())
    assert len(files["swagger-ui-bundle.js"].content) > 1_000_000
    body = document.json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["example"]["model"] == "mine"
    assert {"/health", "/v1/models", "/v1/chat/completions"} < set(document.json()["paths"])
    assert outside.status_code in (401, 404)


@pytest.mark.feature("Operations", "TLS, HTTP/2, proxies, sockets, CORS")
async def test_http2(run_server: RunServer) -> None:
    """With prior knowledge, as `curl --http2-prior-knowledge` does."""
    from h2.config import H2Configuration
    from h2.connection import H2Connection
    from h2.events import DataReceived, ResponseReceived, StreamEnded

    async with run_server() as server:
        host, port = server.url.removeprefix("http://").split(":")
        connection = H2Connection(H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        headers = [(":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", host)]
        connection.send_headers(1, headers)
        connection.send_data(1, json.dumps(server.body("say hello", stream=True)).encode(), end_stream=True)
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(connection.data_to_send())
            events: list = []
            with trio.fail_after(10):
                while not any(isinstance(event, StreamEnded) for event in events):
                    events += connection.receive_data(await stream.receive_some())

    (response,) = [event for event in events if isinstance(event, ResponseReceived)]
    assert dict(response.headers)[":status"] == "200"
    assert b"".join(event.data for event in events if isinstance(event, DataReceived)).endswith(b"data: [DONE]\n\n")


async def test_access_log_has_no_contents(run_server: RunServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dashinfer.access")
    async with run_server(api_keys=("sk-private",)) as server:
        await server.client.post(
            "/v1/chat/completions?sk-private",
            json=server.body("say whisper"),
            headers={"authorization": "Bearer sk-private"},
        )
        await server.client.get("/v1/%0aforged%20line")

    lines = [record.getMessage() for record in caplog.records if record.name == "dashinfer.access"]
    assert lines[0].startswith("POST /v1/chat/completions 200 ")
    assert " ms (18 tokens in, 8 out) req-" in lines[0]
    assert lines[1].startswith("GET /v1/%0aforged%20line 401 ")
    assert "whisper" not in caplog.text
    assert "sk-private" not in caplog.text


async def test_a_client_that_does_not_read_loses_its_connection(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dashinfer.access")
    monkeypatch.setattr("dashinfer.serving.listen.STALLED_CLIENT", 0.2)
    monkeypatch.setattr(edge, "WRITE_PATIENCE", 0.2)
    async with run_server() as server:
        server.engine.at_once = 1000
        # Megabytes, which no buffer between the two takes.
        body = json.dumps(server.body("forever", stream=True, n=16, max_tokens=4000, logprobs=True)).encode()
        request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        with server.connect() as stalled:
            stalled.sendall(request)
            await server.engine.until(lambda: server.engine.running == 1)
            await server.engine.until(lambda: server.engine.running == 0)

    assert server.engine.record[:2] == ["begin", "end"]
    assert "cut short" in caplog.text


async def test_an_http2_client_that_grants_no_room_loses_its_request(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from h2.config import H2Configuration
    from h2.connection import H2Connection

    monkeypatch.setattr(edge, "WRITE_PATIENCE", 0.2)
    async with run_server() as server:
        server.engine.at_once = 1000
        host, port = server.url.removeprefix("http://").split(":")
        connection = H2Connection(H2Configuration(header_encoding="utf-8"))
        connection.initiate_connection()
        headers = [(":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", host)]
        connection.send_headers(1, headers)
        body = server.body("forever", stream=True, n=16, max_tokens=4000, logprobs=True)
        connection.send_data(1, json.dumps(body).encode(), end_stream=True)
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(connection.data_to_send())
            await server.engine.until(lambda: server.engine.running == 1)
            await server.engine.until(lambda: server.engine.running == 0)

    assert server.engine.record[:2] == ["begin", "end"]
    assert "the client stopped reading" in caplog.text


def test_fingerprints_tell_quantisations_apart(text: TextModel) -> None:
    def fingerprint(**settings: Any) -> str:
        engine, service = FakeEngine(), Service(ServerConfig(model="demo", **settings), version="0")
        engine.info = INFO
        service.ready(engine, text)
        return service.system_fingerprint

    found = [fingerprint(), fingerprint(quant_type="a16w4"), fingerprint(quant_type="a16w4", quant_group_size=32)]

    assert len(set(found)) == 3
    assert fingerprint() == found[0]
