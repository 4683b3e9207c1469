"""Probes, the version and the model's description."""

import pytest

from dashinfer.protocol.chat import Health, Model
from dashinfer.protocol.status import Version

from .conftest import RunServer

pytestmark = pytest.mark.feature("Endpoints", "Models, version, probes")

STATES = {  # of the engine: what /health/live and /health/ready answer
    "loading": (200, 503),
    "ready": (200, 200),
    "recovering": (200, 503),
    "draining": (200, 503),
    "failed": (503, 503),
}


@pytest.mark.parametrize("state", STATES)
async def test_probes(run_server: RunServer, state: str) -> None:
    async with run_server() as server:
        server.engine.state = state
        live, ready, health, ping = [
            await server.client.get(path) for path in ("/health/live", "/health/ready", "/health", "/ping")
        ]
        posted = await server.client.post("/ping")

    assert (live.status_code, ready.status_code) == STATES[state]
    assert {health.status_code, ping.status_code, posted.status_code} == {ready.status_code}
    for answer in (live, ready, health, ping):
        status = Health.model_validate_json(answer.content, strict=True).status
        assert status == ("ok" if state == "ready" else state)


async def test_requests_wait_while_workers_start_again(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.state = "recovering"
        models = await server.client.get("/v1/models")

    assert models.status_code == 200


async def test_probes_are_open_and_the_rest_is_not(run_server: RunServer) -> None:
    async with run_server(api_keys=("sk-1",)) as server:
        open_ = [await server.client.get(path) for path in ("/health/live", "/health/ready", "/ping", "/version")]
        closed = [await server.client.get("/v1/models/demo"), await server.client.post("/tokenize", json={"prompt": "a"})]

    assert {answer.status_code for answer in open_} == {200}
    assert {answer.status_code for answer in closed} == {401}


async def test_version(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.client.get("/version")

    assert Version.model_validate_json(answer.content, strict=True).version == "0"


@pytest.mark.parametrize("name", ["Mine", "org%2FMine", "org/Mine"])
async def test_one_model(run_server: RunServer, name: str) -> None:
    served = name.replace("%2F", "/")
    async with run_server(served_model_name=served) as server:
        answer = await server.client.get(f"/v1/models/{name}")
        listed = await server.client.get("/v1/models")
        other = await server.client.get("/v1/models/other")

    assert Model.model_validate_json(answer.content, strict=True).id == served
    assert listed.json()["data"] == [answer.json()]
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
