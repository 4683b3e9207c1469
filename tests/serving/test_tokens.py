"""`/tokenize` and `/detokenize`, with a tokeniser whose tokens are bytes and a template that ends a prompt with a token."""

from typing import Any

import pytest

from dashinfer.protocol.tokens import DetokenizeResponse, TokenizeResponse, TokenizerInfo

from .conftest import RunServer
from .fake_engine import END

pytestmark = pytest.mark.feature("Endpoints", "Tokens")


async def test_a_prompt(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.client.post("/tokenize", json={"model": "demo", "prompt": "a é", "return_token_strs": True})

    tokens = TokenizeResponse.model_validate_json(answer.content, strict=True)
    assert tokens.tokens == [97, 32, 195, 169]
    assert (tokens.count, tokens.max_model_len) == (4, 4096)
    assert tokens.token_strs == ["a", "Ġ", "Ã", "©"]


@pytest.mark.parametrize(
    ("fields", "end"), [({}, [END]), ({"add_generation_prompt": False}, []), ({"continue_final_message": True}, [])]
)
async def test_messages_are_a_chats_prompt(run_server: RunServer, fields: dict[str, Any], end: list[int]) -> None:
    messages = [{"role": "user", "content": "say hi"}]
    async with run_server() as server:
        answer = await server.client.post("/tokenize", json={"messages": messages, **fields})
        await server.client.post("/v1/chat/completions", json={"model": "demo", "messages": messages, **fields})

    assert answer.json()["tokens"] == [*b"user: say hi", *end] == server.engine.submitted[0][0]
    assert answer.json()["token_strs"] is None


async def test_a_long_prompt_takes_a_thread(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.client.post("/tokenize", json={"prompt": "ab" * 100_000})

    assert answer.json()["count"] == 200_000


async def test_there_and_back(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.client.post("/detokenize", json={"tokens": [*"é€".encode(), END]})

    assert DetokenizeResponse.model_validate_json(answer.content, strict=True).prompt == "é€<|end|>"


async def test_special_tokens(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await server.client.get("/tokenizer_info")

    info = TokenizerInfo.model_validate_json(answer.content, strict=True)
    assert (info.eos_token, info.bos_token, info.vocab_size, info.model_max_length) == ("<|end|>", None, 257, 4096)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "data:,"}]}]},
            "messages.0",
        ),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [257]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
    ],
)
async def test_what_is_refused(run_server: RunServer, path: str, body: dict[str, Any], param: str) -> None:
    async with run_server() as server:
        answer = await server.client.post(path, json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model_and_none_yet(run_server: RunServer, path: str) -> None:
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [1]}
    async with run_server() as server:
        other = await server.client.post(path, json={"model": "gpt", **body})
        server.engine.state = "draining"
        late = await server.client.post(path, json=body)

    assert (other.status_code, late.status_code) == (404, 503)
