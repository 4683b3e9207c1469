"""What operators set: TLS, HTTP/2, a path below a proxy, CORS, logs."""

import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from dashinfer.config import ServerConfig
from dashinfer.errors import AddressInUse, ConfigurationError
from dashinfer.serving import listen

from .conftest import RunServer
from .process import running, server_command

ORIGIN = {"origin": "https://page.example"}
PREFLIGHT = {
    **ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def certificate(authority: trustme.CA, tmp_path: Path) -> dict[str, Path]:
    issued = authority.issue_cert("127.0.0.1")
    paths = {"ssl_certfile": tmp_path / "chain.pem", "ssl_keyfile": tmp_path / "key.pem"}
    for pem in issued.cert_chain_pems:
        pem.write_to_path(paths["ssl_certfile"], append=True)
    issued.private_key_pem.write_to_path(paths["ssl_keyfile"])
    return paths


@pytest.mark.feature("Operations", "TLS, HTTP/2, proxies, sockets, CORS")
@pytest.mark.parametrize("http2", [False, True])
async def test_tls(run_server: RunServer, authority: trustme.CA, certificate: dict[str, Path], http2: bool) -> None:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with (
        run_server(**certificate) as server,
        httpx.AsyncClient(base_url=server.url, verify=context, http2=http2) as client,
    ):
        answer = await client.post("/v1/chat/completions", json=server.body("say hello", stream=True))
        health = await client.get("/health")

    assert server.url.startswith("https://127.0.0.1:")
    assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
    assert answer.text.endswith("data: [DONE]\n\n")
    assert health.json()["status"] == "ok"


def test_certificates_that_cannot_be_used(certificate: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "other.pem").write_text("no certificate")
    other = trustme.CA().issue_cert("127.0.0.1")
    other.private_key_pem.write_to_path(tmp_path / "key2.pem")

    listen.check_certificate(*certificate.values())
    for pair in ((tmp_path / "other.pem", certificate["ssl_keyfile"]), (certificate["ssl_certfile"], tmp_path / "key2.pem")):
        with pytest.raises(ConfigurationError, match="cannot be used"):
            listen.check_certificate(*pair)
    with pytest.raises(ConfigurationError, match="go together"):
        ServerConfig(model="demo", ssl_certfile=certificate["ssl_certfile"])


@pytest.mark.feature("Operations", "TLS, HTTP/2, proxies, sockets, CORS")
@pytest.mark.parametrize("prefix", ["/api/llm", ""])
async def test_below_a_proxys_path(run_server: RunServer, prefix: str) -> None:
    """Whether the proxy takes it off or not."""
    async with run_server(root_path="/api/llm", api_keys=("sk-1",)) as server:
        health = await server.client.get(f"{prefix}/health")
        closed = await server.client.get(f"{prefix}/v1/models")
        document = await server.client.get(f"{prefix}/openapi.json")
        headers = {"authorization": "Bearer sk-1"}
        chat = await server.client.post(f"{prefix}/v1/chat/completions", json=server.body("say hi"), headers=headers)
        nothing = await server.client.get("/api/llmx/health", headers=headers)

    assert (health.status_code, closed.status_code, chat.status_code, nothing.status_code) == (200, 401, 200, 404)
    assert document.json()["servers"] == [{"url": "/api/llm"}]


@pytest.mark.parametrize(
    "target", ["/api/health/v1/models", "/health/api/v1/models", "/api/api/v1/models", "/api//v1/models", "/docs/api/v1/models"]
)
async def test_a_prefix_opens_nothing(run_server: RunServer, target: str) -> None:
    async with run_server(root_path="/api", api_keys=("sk-1",)) as server:
        answer = await server.client.get(target)

    assert answer.status_code == 401


@pytest.mark.feature("Operations", "TLS, HTTP/2, proxies, sockets, CORS")
@pytest.mark.parametrize(
    ("allowed", "answered"),
    [
        (("*",), "*"),
        (("https://page.example", "https://b.example"), "https://page.example"),
        (("https://b.example",), None),
        ((), None),
    ],
)
async def test_cors(run_server: RunServer, allowed: tuple[str, ...], answered: str | None) -> None:
    async with run_server(cors_origins=allowed, api_keys=("sk-1",)) as server:
        preflight = await server.client.options("/v1/chat/completions", headers=PREFLIGHT)
        refused = await server.client.post("/v1/chat/completions", json=server.body("say no"), headers=ORIGIN)
        headers = {**ORIGIN, "authorization": "Bearer sk-1"}
        chat = await server.client.post("/v1/chat/completions", json=server.body("say hi"), headers=headers)

    assert (chat.status_code, refused.status_code) == (200, 401)
    for answer in (chat, refused):
        assert answer.headers.get("access-control-allow-origin") == answered
    assert ("x-request-id" in chat.headers.get("access-control-expose-headers", "")) == (answered is not None)
    assert chat.headers.get("vary") == ("origin" if allowed and allowed != ("*",) else None)
    if answered is None:
        assert preflight.status_code == 401
        return
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == answered
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["access-control-request-headers"]


@pytest.mark.feature("Operations", "Structured logs, request ids")
async def test_request_ids_are_logged(run_server: RunServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="dashinfer.access")
    async with run_server() as server:
        answer = await server.client.get("/v1/models", headers={"x-request-id": "mine-1"})
        await server.service.idle()

    assert answer.headers["x-request-id"] == "mine-1"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dashinfer.access"]
    assert line.endswith(" mine-1")


@pytest.mark.feature("Operations", "Structured logs, request ids")
@pytest.mark.parametrize("asked", [False, True])
async def test_prompts_are_logged_on_demand_only(run_server: RunServer, caplog: pytest.LogCaptureFixture, asked: bool) -> None:
    caplog.set_level("DEBUG", logger="dashinfer")
    async with run_server(log_prompts=asked) as server:
        await server.client.post("/v1/chat/completions", json=server.body("say whisper"), headers={"x-request-id": "mine-2"})

    lines = [record.getMessage() for record in caplog.records if "whisper" in record.getMessage()]
    assert lines == (["request mine-2 prompt: 'user: say whisper<|end|>'"] if asked else [])


@pytest.mark.feature("Operations", "TLS, HTTP/2, proxies, sockets, CORS")
@pytest.mark.feature("Operations", "Structured logs, request ids")
def test_a_unix_socket_and_json_logs(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    flags = ["--uds", str(path), "--log-format", "json", "--log-prompts", "--root-path", "/api"]
    with running(server_command(tmp_path, *flags)) as server:
        server.wait_for("docs +/api/docs")
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://server") as client:
            body = {"model": "demo", "messages": [{"role": "user", "content": "say hi"}]}
            answer = client.post("/api/v1/chat/completions", json=body, headers={"x-request-id": "mine-3"})
            server.wait_for("POST /api/v1/chat/completions 200")
            with pytest.raises(AddressInUse, match="another server listens there"), listen.bind_unix(path):
                pass
        server.signal(2)
        status = server.end()

    lines = [json.loads(line) for line in server.said]
    by_logger: dict[str, dict[str, Any]] = {line["logger"]: line for line in lines}
    access, prompt = by_logger["dashinfer.access"], by_logger["dashinfer.prompts"]
    assert (answer.status_code, status) == (200, 0)
    assert (access["method"], access["path"], access["status"]) == ("POST", "/api/v1/chat/completions", 200)
    assert (access["request_id"], access["level"], access["note"]) == ("mine-3", "info", "13 tokens in, 3 out")
    assert access["milliseconds"] > 0
    assert (prompt["request_id"], prompt["prompt"]) == ("mine-3", "user: say hi<|end|>")
    assert any("address" in line["message"] and f"unix:{path}" in line["message"] for line in lines)
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen.bind_unix(path) as (first,):
        first.close()
        with listen.bind_unix(path) as (second,):
            assert listen.url([second]) == f"unix:{path}"
    path.write_text("precious")
    with pytest.raises(AddressInUse), listen.bind_unix(path):
        pass

    assert path.read_text() == "precious"
