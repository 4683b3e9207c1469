"""Prompts that are too long to fit are refused before they are tokenised."""

from typing import Any

import pytest

from dashinfer.serving.room import MAX_CHARACTERS_PER_TOKEN
from dashinfer.text.tokenizer import Tokenizer

from .conftest import RunServer
from .fake_engine import INFO

LONG = "x" * (INFO.max_length * MAX_CHARACTERS_PER_TOKEN + 1)
CHAT = {"messages": [{"role": "user", "content": LONG}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT, "messages"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": ["a", LONG]}, "prompt"),
        ("/v1/embeddings", {"input": [LONG]}, "input"),
        ("/v1/responses", {"input": LONG}, "input"),
        ("/v1/messages", {**CHAT, "max_tokens": 1}, None),
        ("/v1/messages/count_tokens", CHAT, None),
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", CHAT, "messages"),
    ],
)
async def test_long_texts(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], param: str | None
) -> None:
    tokenised = []
    encode = Tokenizer.encode

    def watched(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        tokenised.append(len(text))
        return encode(tokenizer, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode", watched)
    async with run_server() as server:
        tokenised.clear()
        answer = await server.client.post(path, json={"model": "demo", **body})

    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(
        f"prompt is too long: this model's maximum context length is {INFO.max_length} tokens, and "
    )
    assert " characters: shorten " in error["message"]
    assert error.get("param") == param
    assert max(tokenised, default=0) < 100


async def test_tokens_beyond_the_context_are_counted(run_server: RunServer) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "x" * 5000}]}
    async with run_server() as server:
        counted = await server.client.post("/v1/messages/count_tokens", json=body)
        asked = await server.client.post("/v1/messages", json={**body, "max_tokens": 1})

    assert (counted.status_code, asked.status_code) == (200, 400)
    assert counted.json()["input_tokens"] == len("user: ") + 5000 + 1


async def test_a_small_request_for_a_long_conversation_takes_a_thread(
    run_server: RunServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_server() as server:
        given = [{"role": "user", "content": [{"type": "input_text", "text": ""}] * 400}] * 5 + [
            {"role": "user", "content": "a"}
        ]
        first = await server.client.post("/v1/responses", json={"model": "demo", "input": given, "max_output_tokens": 1})
        sizes = []
        whole = server.service.off_the_loop

        async def watched(size: int, work: Any) -> Any:
            sizes.append(size)
            return await whole(size, work)

        monkeypatch.setattr(server.service, "off_the_loop", watched)
        body = {"model": "demo", "input": "say hi", "previous_response_id": first.json()["id"]}
        await server.client.post("/v1/responses", json=body)
        await server.client.get(f"/v1/responses/{first.json()['id']}/input_items")

    assert first.status_code == 200, first.text
    assert [size > 9000 for size in sizes] == [False, True, True]
