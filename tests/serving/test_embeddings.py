"""`/v1/embeddings`; the fake engine's are (3, 4, number of tokens) before they are scaled."""

import base64
import math
from array import array
from typing import Any

import httpx
import openai
import pytest
import trio

from dashinfer.protocol.embeddings import EmbeddingList

from .conftest import RunServer

pytestmark = pytest.mark.feature("Endpoints", "Embeddings")


def vector(tokens: int, dimensions: int = 3) -> list[float]:
    values = [3.0, 4.0, float(tokens)][:dimensions]
    return [value / math.hypot(*values) for value in values]


async def test_texts_and_tokens(run_server: RunServer) -> None:
    async with run_server() as server:
        answers = [
            await server.client.post("/v1/embeddings", json={"model": "demo", "input": given})
            for given in ("four", list(b"four"), ["four", "sixsix"], [list(b"four"), list(b"sixsix")])
        ]
        params = [each for _, (each,), _ in server.engine.submitted]

    found = [EmbeddingList.model_validate_json(answer.content, strict=True) for answer in answers]
    for answer in answers:
        openai.types.CreateEmbeddingResponse.model_validate_json(answer.content, strict=True)
    assert [[each.embedding for each in one.data] for one in found] == [
        [pytest.approx(vector(len(text))) for text in texts] for texts in [("four",)] * 2 + [("four", "sixsix")] * 2
    ]
    assert [each.index for each in found[3].data] == [0, 1]
    assert (found[3].usage.prompt_tokens, found[3].usage.total_tokens) == (10, 10)
    assert {(each.pooling, each.max_tokens) for each in params} == {("mean", 1)}


async def test_dimensions_format_and_pooling(run_server: RunServer) -> None:
    fields = {"dimensions": 2, "encoding_format": "base64", "pooling": "last"}
    async with run_server() as server:
        answer = await server.client.post("/v1/embeddings", json={"model": "demo", "input": "four", **fields})
        (_, (params,), _), *_ = server.engine.submitted

    (found,) = answer.json()["data"]
    assert array("f", base64.b64decode(found["embedding"])).tolist() == pytest.approx([0.6, 0.8])
    assert params.pooling == "last"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": [["a"]]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": "a" * 4096}, "input"),
        ({"dimensions": 4}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"pooling": "max"}, "pooling"),
    ],
)
async def test_what_is_refused(run_server: RunServer, fields: dict[str, Any], param: str) -> None:
    async with run_server() as server:
        answer = await server.client.post("/v1/embeddings", json={"model": "demo", "input": "a", **fields})
        await server.engine.until(lambda: server.engine.running == 0)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.feature("Clients", "OpenAI's for Python")
async def test_the_openai_client(run_server: RunServer) -> None:
    async with run_server() as server:

        def use() -> Any:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=10) as client:
                return client.embeddings.create(model="demo", input=["four", "sixsix"])

        found = await trio.to_thread.run_sync(use)

    assert [each.embedding for each in found.data] == [pytest.approx(vector(4)), pytest.approx(vector(6))]


async def test_a_long_list_leaves_room_in_the_queue(run_server: RunServer) -> None:
    answers: list[httpx.Response] = []
    async with run_server(max_queue=4) as server:
        server.engine.gate = trio.Event()

        async def ask() -> None:
            answers.append(await server.client.post("/v1/embeddings", json={"model": "demo", "input": ["a"] * 7}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            first = await server.engine.submitted_by_then(running=2)
            server.engine.gate.set()

    assert first == 2
    assert [item["index"] for item in answers[0].json()["data"]] == list(range(7))
