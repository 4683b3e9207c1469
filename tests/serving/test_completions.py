"""`/v1/completions`, with a tokeniser whose tokens are bytes."""

import json
from typing import Any

import httpx
import openai
import pytest
import trio

from dashinfer.errors import InternalError, QueueFull
from dashinfer.protocol.completions import Completion

from .conftest import Running, RunServer
from .fake_engine import END

pytestmark = pytest.mark.feature("Endpoints", "Completions, likelihoods of prompts")


async def ask(server: Running, prompt: Any, **fields: Any) -> httpx.Response:
    return await server.client.post("/v1/completions", json={"model": "demo", "prompt": prompt, **fields})


def completion(answer: httpx.Response) -> Completion:
    assert answer.status_code == 200, answer.text
    found = Completion.model_validate_json(answer.content)
    assert found.usage is not None
    assert all(choice.finish_reason is not None for choice in found.choices)
    return found


def streamed(answer: httpx.Response) -> Completion:
    """The events of a stream with usage, put together."""
    *events, done = answer.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    choices: dict[int, dict] = {}
    for chunk in chunks:
        Completion.model_validate(chunk)
        for part in chunk["choices"]:
            whole = choices.setdefault(part["index"], {"index": part["index"], "text": "", "logprobs": None})
            assert whole.get("finish_reason") is None, "nothing comes after the end"
            whole["text"] += part["text"]
            whole["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                before = whole["logprobs"] or {name: [] for name in part["logprobs"]}
                whole["logprobs"] = {name: before[name] + values for name, values in part["logprobs"].items()}
    return Completion.model_validate({**chunks[-1], "choices": [choices[index] for index in sorted(choices)]})


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "say hello"},
        {"prompt": "say hello", "max_tokens": 3, "n": 2},
        {"prompt": ["say hello", "say bye"], "n": 2, "stop": ["ll"]},
        {"prompt": [list(b"say hi"), list(b"say bye")], "echo": True},
        {"prompt": "say hello", "logprobs": 2},
        {"prompt": ["say hello", "say bye"], "logprobs": 2, "echo": True, "n": 2},
        {"prompt": "say h\u00e9llo", "logprobs": 0, "echo": True, "max_tokens": 0},
        {"prompt": "say a\u20acb", "stop": "b", "logprobs": 1},
    ],
)
async def test_a_stream_is_the_whole_in_pieces(run_server: RunServer, fields: dict[str, Any], at_once: int) -> None:
    async with run_server() as server:
        server.engine.at_once = at_once
        whole = completion(await ask(server, **fields))
        pieces = streamed(await ask(server, **fields, stream=True, stream_options={"include_usage": True}))

    assert pieces.choices == whole.choices
    assert pieces.usage == whole.usage


async def test_every_form_of_prompt(run_server: RunServer) -> None:
    prompts = ["say a", ["say a"], list(b"say a"), [list(b"say a")], ["say a", "say b"], [list(b"say a"), list(b"say b")]]
    async with run_server() as server:
        found = [completion(await ask(server, prompt)) for prompt in prompts]
        submitted = [bytes(prompt) for prompt, *_ in server.engine.submitted]

    assert [[choice.text for choice in each.choices] for each in found] == [["a"]] * 4 + [["a", "b"]] * 2
    assert set(submitted) == {b"say a", b"say b"}
    assert found[-1].usage.prompt_tokens == 2 * len("say a")
    assert found[-1].usage.completion_tokens == 4
    assert found[0].id.startswith("cmpl-")


async def test_choices_are_numbered_through_the_prompts(run_server: RunServer) -> None:
    async with run_server() as server:
        found = completion(await ask(server, ["say a", "say b"], n=2, best_of=2, seed=7))
        seeds = [[each.seed for each in params] for _, params, _ in server.engine.submitted]

    assert [(choice.index, choice.text) for choice in found.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert seeds == [[7, 8], [7, 8]]


async def test_sixteen_tokens_by_default(run_server: RunServer) -> None:
    async with run_server() as server:
        found = completion(await ask(server, "forever"))

    assert (found.choices[0].text, found.choices[0].finish_reason) == ("x" * 16, "length")


async def test_log_probabilities_include_the_end(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await ask(server, "say \u20acb", logprobs=2)

    openai.types.Completion.model_validate_json(answer.content, strict=True)
    found = completion(answer).choices[0]
    assert (found.text, found.finish_reason) == ("\u20acb", "stop")
    logprobs = found.logprobs
    assert logprobs.tokens == ["\ufffd"] * 3 + ["b", "<|end|>"]
    assert logprobs.text_offset == [0, 0, 0, 1, 2]
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.top_logprobs[3] == {"A": -0.5, "B": -0.5, "b": -0.5}


async def test_the_token_that_completes_a_stop_string_has_none(run_server: RunServer) -> None:
    async with run_server() as server:
        found = completion(await ask(server, "say abc", stop="b", logprobs=0))
        record = server.engine.record

    assert found.choices[0].text == "a"
    assert found.choices[0].logprobs.tokens == ["a"]
    assert found.usage.completion_tokens == 2
    assert "stop 0" in record


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("tokens", [False, True])
async def test_log_likelihoods_of_a_prompt(run_server: RunServer, tokens: bool, max_tokens: int) -> None:
    """What evaluation harnesses ask for, n choices of it too."""
    prompt = "say \u00e9a"
    async with run_server() as server:
        fields = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "n": 2, "temperature": 0}
        found = completion(await ask(server, list(prompt.encode()) if tokens else prompt, **fields))
        (_, params, _), *_ = server.engine.submitted

    assert [each.prompt_logprobs for each in params] == [1, None]
    for choice in found.choices:
        assert choice.text == prompt + "\ufffd" * max_tokens
        assert choice.finish_reason == "length"
        size = len(prompt.encode())
        assert choice.logprobs.token_logprobs == [None, *map(float, range(-1, -size, -1)), *[-0.5] * max_tokens]
        assert choice.logprobs.tokens[:4] == ["s", "a", "y", " "]
        assert choice.logprobs.text_offset == [0, 1, 2, 3, 4, 4, 5, *[6] * max_tokens]
        assert choice.logprobs.top_logprobs[:2] == [None, {"A": -0.25, "a": -1.0}]
    assert found.usage.completion_tokens == 2 * max_tokens


async def test_an_echo_without_log_probabilities_asks_for_none(run_server: RunServer) -> None:
    async with run_server() as server:
        found = completion(await ask(server, "say <|end|>", echo=True))
        (tokens, params, _), *_ = server.engine.submitted

    assert tokens == [*b"say ", END]
    assert params[0].prompt_logprobs is None
    assert found.choices[0].text == "say <|end|>"
    assert found.choices[0].logprobs is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": "a" * 4096}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
async def test_what_is_refused(run_server: RunServer, fields: dict[str, Any], param: str) -> None:
    async with run_server() as server:
        answer = await server.client.post("/v1/completions", json={"model": "demo", "prompt": "say no", **fields})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert server.engine.submitted == []


async def test_every_choice_of_every_prompt_follows_the_grammar(run_server: RunServer) -> None:
    async with run_server() as server:
        completion(await ask(server, ["say a", "say b"], n=2, guided_choice=["a", "b"]))

    assert [grammar and grammar.param for grammar in server.engine.grammars] == ["guided_choice"] * 2


async def test_a_full_queue_refuses_all_prompts(run_server: RunServer) -> None:
    async with run_server() as server:
        submit, server.engine.submitted = server.engine.submit, []

        def one_only(*arguments: Any) -> Any:
            if server.engine.submitted:
                raise QueueFull("one waits already")
            return submit(*arguments)

        server.engine.submit = one_only
        answer = await ask(server, ["wait ab", "say b"])
        await server.engine.until(lambda: server.engine.running == 0)

    assert answer.status_code == 429
    assert server.engine.record[:2] == ["begin", "end"]


async def test_log_probabilities_of_prompts_are_bounded(run_server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashinfer.serving.completions.MAX_PROMPT_LOGPROBS", 2 * len("say hi") * 3)
    fields = {"echo": True, "logprobs": 2, "max_tokens": 1}
    async with run_server() as server:
        fits = await ask(server, ["say hi"] * 2, **fields)
        too_many = await ask(server, ["say hi"] * 3, **fields)
        of_choices = await ask(server, ["say hi"] * 2, n=2, **fields)
        submitted = len(server.engine.submitted)

    assert (fits.status_code, submitted) == (200, 2)
    for answer in (too_many, of_choices):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "logprobs"


@pytest.mark.parametrize("stream", [False, True])
async def test_many_prompts_leave_room_in_the_queue(run_server: RunServer, stream: bool) -> None:
    prompts = [f"say {number}" for number in range(7)]
    answers: list[httpx.Response] = []
    async with run_server(max_queue=4) as server:
        server.engine.gate = trio.Event()

        async def ask_all() -> None:
            options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
            answers.append(await ask(server, prompts, **options))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_all)
            first = await server.engine.submitted_by_then(running=2)
            server.engine.gate.set()

    assert first == 2
    found = (streamed if stream else completion)(answers[0])
    assert [choice.text for choice in found.choices] == [str(number) for number in range(7)]


async def test_a_stream_that_fails_says_so(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.lost = InternalError("the engine lost this request")
        answer = await ask(server, "say hello", stream=True)

    assert "lost this request" in answer.text
    assert "[DONE]" not in answer.text


@pytest.mark.feature("Clients", "OpenAI's for Python")
async def test_the_openai_client(run_server: RunServer) -> None:
    async with run_server() as server:

        def use() -> tuple[Any, list[Any]]:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=10) as client:
                whole = client.completions.create(model="demo", prompt=["say one", "say two"], logprobs=1, echo=True)
                return whole, list(client.completions.create(model="demo", prompt="say three", stream=True))

        whole, chunks = await trio.to_thread.run_sync(use)

    assert [choice.text for choice in whole.choices] == ["say oneone", "say twotwo"]
    assert whole.choices[0].logprobs.token_logprobs[0] is None
    assert "".join(chunk.choices[0].text for chunk in chunks) == "three"
