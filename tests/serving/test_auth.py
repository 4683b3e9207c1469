"""API keys: what is open, what is closed, and what does not get around them."""

import pytest
import trio

from .conftest import RunServer

pytestmark = pytest.mark.feature("Security", "Keys with limits of their own")

KEYS = ("sk-key1", "sk-key2")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_keys_open(run_server: RunServer, key: str, scheme: str) -> None:
    async with run_server(api_keys=KEYS) as server:
        server.client.headers["authorization"] = f"{scheme} {key}"
        assert (await server.client.get("/v1/models")).status_code == 200
        assert (await server.chat("say yes")).status_code == 200


async def test_the_other_header(run_server: RunServer) -> None:
    async with run_server(api_keys=KEYS) as server:
        statuses = [
            (await server.client.get("/v1/models", headers=headers)).status_code
            for headers in (
                [("x-api-key", "sk-key1")],
                [("x-api-key", "sk-key")],
                [("x-api-key", "sk-key1"), ("x-api-key", "sk-key2")],
                [("x-api-key", "sk-key1"), ("authorization", "Bearer wrong")],
            )
        ]

    assert statuses == [200, 401, 401, 401]


async def test_open_paths(run_server: RunServer) -> None:
    async with run_server(api_keys=KEYS) as server:
        for path in ("/", "/chat/chat.js", "/health", "/docs", "/openapi.json", "/docs/start.js"):
            assert (await server.client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        None, b"", b"Bearer", b"sk-key1", b"Basic sk-key1", b"Bearer sk-key", b"Bearer sk-key11", b"Bearer sk-key1,sk-key2",
        b"Bearer sk-key1 sk-key2", b"Bearer \xff\xfe", "Bearer schlüssel".encode(), b"Bearer " + b"a" * 9000,
    ],
)  # fmt: skip
async def test_keys_that_do_not_open(run_server: RunServer, header: bytes | None) -> None:
    async with run_server(api_keys=KEYS) as server:
        answer = await server.client.get("/v1/models", headers={} if header is None else [(b"authorization", header)])

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "sk-key" not in answer.text


async def test_two_authorization_headers(run_server: RunServer) -> None:
    async with run_server(api_keys=KEYS) as server:
        headers = [("authorization", "Bearer wrong"), ("authorization", "Bearer sk-key1")]
        assert (await server.client.get("/v1/models", headers=headers)).status_code == 401


async def test_a_refused_upload_reads_its_refusal(run_server: RunServer) -> None:
    async with run_server(api_keys=KEYS) as server:
        answer = await server.client.post("/v1/chat/completions", content=b"x" * (8 * 2**20))

    assert answer.status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models", "//v1/models", "/v1//models", "/./v1/models", "/health/../v1/models", "/docs/../v1/models",
        "/%76%31/models", "/v1%2fmodels", "/V1/models", "/v1/models/",
        "/v1/models?/health", "/v1/models;/health", "/docs/%2e%2e/v1/models", "/chat/../v1/models",
        "http://example.org/v1/models", "/health%00/../v1/models", "/docs/swagger-ui.css/../../v1/models",
    ],
)  # fmt: skip
async def test_no_spelling_gets_around_the_keys(run_server: RunServer, target: str) -> None:
    """Sent raw, since clients tidy addresses up."""
    async with run_server(api_keys=KEYS) as server:
        host, port = server.url.removeprefix("http://").split(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            # A Host header that would make a rebuilt address look like an open one.
            await stream.send_all(f"GET {target} HTTP/1.1\r\nhost: x/health?\r\nconnection: close\r\n\r\n".encode())
            with trio.fail_after(10):
                answer = b"".join([part async for part in stream])

    assert answer.split(b" ")[1] in (b"401", b"400", b"404")
    assert b'"owned_by"' not in answer


async def test_websockets_are_refused(run_server: RunServer) -> None:
    async with run_server(api_keys=KEYS) as server:
        headers = {
            "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
            "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }  # fmt: skip
        with trio.fail_after(10):
            answer = await server.client.get("/v1/models", headers=headers)

    assert answer.status_code == 403
