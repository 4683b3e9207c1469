"""The OpenAI client against the real routes."""

import openai
import pytest
import trio

from .conftest import Running, RunServer

pytestmark = pytest.mark.feature("Clients", "OpenAI's for Python")

MESSAGES = [{"role": "user", "content": "say The capital of France is Paris."}]


def client_of(server: Running, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=10)


async def test_client(run_server: RunServer) -> None:
    async with run_server() as server:
        with client_of(server) as client:

            def use() -> tuple:
                whole = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0.7, max_tokens=256)
                stream = client.chat.completions.create(
                    model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
                )
                return whole, list(stream), client.models.list().data

            whole, chunks, models = await trio.to_thread.run_sync(use)

    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "The capital of France is Paris."
    assert chunks[-1].usage == whole.usage
    assert [model.id for model in models] == ["demo"]


async def test_errors_have_the_clients_types(run_server: RunServer) -> None:
    async with run_server(api_keys=("sk-1",)) as server:
        with client_of(server, "sk-1") as good, client_of(server, "sk-2") as bad:

            def use() -> None:
                with pytest.raises(openai.AuthenticationError):
                    bad.models.list()
                with pytest.raises(openai.NotFoundError) as unknown:
                    good.chat.completions.create(model="other", messages=MESSAGES)
                assert unknown.value.code == "model_not_found"
                with pytest.raises(openai.BadRequestError) as invalid:
                    good.chat.completions.create(model="demo", messages=MESSAGES, temperature=9, stream=True)
                assert invalid.value.param == "temperature"

            await trio.to_thread.run_sync(use)


async def test_a_stream_that_fails_raises(run_server: RunServer) -> None:
    from dashinfer.errors import InternalError

    async with run_server() as server:
        server.engine.lost = InternalError("the engine lost this request")
        with client_of(server) as client:

            def use() -> None:
                stream = client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
                with pytest.raises(openai.APIError, match="lost this request"):
                    list(stream)

            await trio.to_thread.run_sync(use)
