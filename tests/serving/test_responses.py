"""The Responses API. The model's output is what the prompt tells it to say."""

import gc
import json
import tracemalloc
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import openai
import openai.types.responses as theirs
import pytest
import trio
import trio.testing
from pydantic import TypeAdapter

from dashinfer.errors import InternalError, NotFound
from dashinfer.protocol.response_encoder import ResponseEvent, ResponseObject
from dashinfer.protocol.responses import DeletedResponse, ItemList, Page
from dashinfer.serving.auth import NOBODY
from dashinfer.serving.event_log import EventLog
from dashinfer.serving.response_store import SHARE, Kept, ResponseStore
from dashinfer.serving.responses import Responses
from dashinfer.serving.service import TextModel
from dashinfer.text.tools.formats import ToolFormat

from .conftest import Running, RunServer
from .test_tools import CALL, WEATHER, make_model

pytestmark = pytest.mark.feature("Endpoints", "Responses, kept and gone on with")

TOOL = {"type": "function", **WEATHER["function"]}
THEIR_EVENT = TypeAdapter(theirs.ResponseStreamEvent)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return make_model(tmp_path_factory.mktemp("model"), ToolFormat("hermes"))


async def ask(server: Running, given: Any = "say hi", **fields: Any) -> httpx.Response:
    return await server.client.post("/v1/responses", json={"model": "demo", "input": given, **fields})


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    found = []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {ResponseEvent.model_validate(found[-1]).type}"
        assert THEIR_EVENT.validate_python(found[-1]).type == found[-1]["type"]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_ids(inner) for name, inner in value.items() if name not in ("id", "call_id", "created_at")}
    return [without_ids(inner) for inner in value] if isinstance(value, list) else value


async def test_text(run_server: RunServer) -> None:
    async with run_server() as server:
        answer = await ask(server, "say hello", instructions="be kind", metadata={"a": "b"})
        (prompt, *_), *_ = server.engine.submitted

    found = ResponseObject.model_validate_json(answer.content)
    theirs.Response.model_validate_json(answer.content, strict=True)
    assert (found.status, found.error, found.incomplete_details) == ("completed", None, None)
    (message,) = found.output
    assert message["content"] == [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}]
    assert (message["role"], message["status"]) == ("assistant", "completed")
    assert (found.usage.input_tokens, found.usage.output_tokens) == (len(prompt), len("hello") + 1)
    assert bytes(prompt[:-1]) == b"system: be kinduser: say hello"
    assert answer.json()["metadata"] == {"a": "b"}


@pytest.mark.parametrize("at_once", [1, 1000])
@pytest.mark.parametrize("most", [None, 16])
async def test_a_stream_tells_what_the_whole_has(
    run_server: RunServer, model: TextModel, at_once: int, most: int | None
) -> None:
    fields = {"tools": [TOOL], **({} if most is None else {"max_output_tokens": most})}
    said = f"say <think>hm</think>Look! {CALL}"
    async with run_server(model=model) as server:
        server.engine.at_once = at_once
        whole = (await ask(server, said, **fields)).json()
        events = events_of(await ask(server, said, **fields, stream=True))

    kinds = ["reasoning", "message", "function_call"]
    assert [item["type"] for item in whole["output"]] == (kinds if most is None else kinds[: len(whole["output"])])
    assert whole["status"] == ("completed" if most is None else "incomplete")
    if most is None:
        assert json.loads(whole["output"][2]["arguments"]) == {"city": "Paris"}
        assert whole["output"][0]["content"][0]["text"] == "hm"
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    pieces: dict[int, str] = {}
    done: dict[int, Any] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            pieces[event["output_index"]] = pieces.get(event["output_index"], "") + event["delta"]
        if event["type"] == "response.output_item.done":
            done[event["output_index"]] = event["item"]
    assert [done[index] for index in sorted(done)] == events[-1]["response"]["output"]
    for index, item in done.items():
        assert pieces[index] == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation(run_server: RunServer, model: TextModel, stream: bool) -> None:
    async with run_server(model=model) as server:

        async def turn(given: Any, **fields: Any) -> str:
            answer = await ask(server, given, tools=[TOOL], stream=stream, **fields)
            return (events_of(answer)[-1]["response"] if stream else answer.json())["id"]

        first = await turn(f"say <think>hm</think>{CALL}", instructions="forgotten")
        kept = await server.client.get(f"/v1/responses/{first}")
        call = kept.json()["output"][1]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Mild."}
        second = await turn(
            [result, {"role": "user", "content": [{"type": "input_text", "text": "say so"}]}], previous_response_id=first
        )
        prompt, *_ = server.engine.submitted[-1]
        items = await server.client.get(f"/v1/responses/{second}/input_items?order=asc")
        deleted = await server.client.delete(f"/v1/responses/{first}")
        gone = await server.client.get(f"/v1/responses/{first}")
        cancelled = await server.client.post(f"/v1/responses/{second}/cancel")
        lost = await ask(server, previous_response_id=first)
        third = await turn("say on", previous_response_id=second)

    shown = model.tokenizer.decode(prompt, skip_special_tokens=False)
    assert shown.split("\n", 1)[1].startswith(f"user: say <think>hm</think>{CALL}\nassistant: (hm)[weather Paris]\n")
    assert shown.endswith("tool weather: Mild.\nuser: say so<|end|>")
    assert "forgotten" not in shown
    assert [item["type"] for item in ItemList.model_validate_json(items.content).data] == [
        *("message", "reasoning", "function_call", "function_call_output", "message"),
    ]
    assert DeletedResponse.model_validate_json(deleted.content).id == first
    assert (gone.status_code, cancelled.status_code, lost.status_code) == (404, 400, 404)
    assert lost.json()["error"]["param"] == "previous_response_id"
    assert third.startswith("resp_")


async def test_what_is_not_kept_and_whose_it_is(run_server: RunServer) -> None:
    one, two = ({"authorization": f"Bearer sk-{number}"} for number in (1, 2))
    async with run_server(api_keys=("sk-1", "sk-2")) as server:
        server.client.headers.update(one)
        kept = (await ask(server)).json()["id"]
        not_kept = (await ask(server, store=False)).json()["id"]
        own, none = [await server.client.get(f"/v1/responses/{id}") for id in (kept, not_kept)]
        other = await server.client.get(f"/v1/responses/{kept}", headers=two)

    assert (own.status_code, none.status_code, other.status_code) == (200, 404, 404)


def kept(size: int) -> Kept:
    return Kept(b"x" * size, (), b"")


def ids(store: ResponseStore, owner: bytes) -> list[int]:
    """Which of the first ten are there."""
    found = []
    for number in range(10):
        with suppress(NotFound):
            store.get(owner, str(number))
            found.append(number)
    return found


def test_a_key_has_a_share_of_the_store() -> None:
    store = ResponseStore(most=8, most_bytes=400)
    for number in range(3):
        store.put(b"a", str(number), kept(10))
    by_number = ids(store, b"a")
    store.get(b"a", "1")
    store.put(b"a", "3", kept(70))
    store.put(b"a", "4", kept(101))
    by_size = ids(store, b"a")
    store.put(b"a", "5", kept(40))

    assert (by_number, by_size, ids(store, b"a")) == ([1, 2], [1, 3], [5])
    store.delete(b"a", "5")
    assert store.size == 0


def test_events_go_before_their_response_does() -> None:
    store, events = ResponseStore(most=8, most_bytes=400), EventLog()
    events.append(bytes(range(256)) + b"\n\n")
    events.end()
    store.put(b"a", "0", Kept(b"x", (), b"", background=True, events=events))

    assert store.get(b"a", "0").events is None
    assert store.size == 1


async def test_what_takes_too_much_is_kept_in_part(run_server: RunServer) -> None:
    given = [{"role": "user", "content": "x" * 2000}, {"role": "user", "content": "say hi"}]
    body = {"model": "demo", "input": given, "background": True, "stream": True}
    async with run_server() as server:

        async def kept_of(most: int) -> tuple[Responses, str]:
            responses = Responses(server.service, ResponseStore(most_bytes=SHARE * most))
            with ExitStack() as stack:
                id = (await responses.start(json.dumps(body).encode(), stack)).id
            await trio.testing.wait_all_tasks_blocked()
            assert json.loads(await responses.get(id))["status"] == "completed"
            return responses, id

        all_, id = await kept_of(10**6)
        whole = all_.store.get(b"", id)
        without_events = await kept_of(whole.size - whole.events.size // 2)
        without_conversation = await kept_of(len(whole.body) + 200)
        for responses, id in (without_events, without_conversation):
            with pytest.raises(NotFound, match=r"the events of 'resp_.*' took too much to be kept"):
                responses.follow(id, -1)
        responses, id = without_events
        page = json.loads(await responses.input_items(id, Page()))
        responses, id = without_conversation
        with pytest.raises(NotFound, match=r"the conversation of 'resp_.*' took too much to be kept"):
            await responses.input_items(id, Page())
        with pytest.raises(NotFound, match="the conversation of") as refused:
            await responses.start(json.dumps({"model": "demo", "input": "a", "previous_response_id": id}).encode(), ExitStack())

    assert len(page["data"]) == 2
    assert refused.value.param == "previous_response_id"


def test_without_keys_all_of_the_store_is_one_share() -> None:
    store = ResponseStore(most=8, most_bytes=400)
    for number in range(9):
        store.put(NOBODY, str(number), kept(10))
    store.put(NOBODY, "9", kept(101))

    assert ids(store, NOBODY) == list(range(1, 9))


def test_who_has_most_of_a_full_store_gives() -> None:
    store = ResponseStore(most=40, most_bytes=400)
    store.put(b"small", "0", kept(20))
    for owner in (b"a", b"b", b"c", b"d", b"e"):
        for number in range(10):
            store.put(owner, str(number), kept(30))
    crowded = ResponseStore(most=8, most_bytes=400)
    crowded.put(b"small", "0", kept(1))
    for owner in (b"a", b"b", b"c", b"d", b"e"):
        for number in range(4):
            crowded.put(owner, str(number), kept(1))

    assert ids(store, b"small") == ids(crowded, b"small") == [0]
    assert 300 < store.size <= 400
    assert crowded.size == 8


async def test_what_is_kept_takes_no_more_memory_than_is_counted(run_server: RunServer) -> None:
    given = [{"type": "reasoning", "x": [[]] * 10**5}, {"role": "user", "content": "say hi"}]
    body = json.dumps({"model": "demo", "input": given}).encode()
    async with run_server() as server:
        kept = Responses(server.service)
        with ExitStack() as stack:
            tracemalloc.start()
            answer = await kept.start(body, stack)
            id = json.loads(await answer.body())["id"]
            del answer
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        page = json.loads(await kept.input_items(id, Page(order="asc")))

    assert used < 2 * kept.store.size
    assert page["data"][0]["x"] == given[0]["x"]


async def test_structured_output_and_reasoning_reach_the_chat(run_server: RunServer) -> None:
    schema = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    async with run_server() as server:
        good = await ask(server, text={"format": schema}, reasoning={"effort": "low"})
        bad = await ask(server, text={"format": {**schema, "schema": {"type": "nonsense"}}})

    assert good.status_code == 200, good.text
    assert good.json()["text"] == {"format": schema}
    assert bad.status_code == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": "x" * 4096 * 257}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input.0.arguments"),
        ({"input": [{"type": "reasoning", "content": 5}]}, "input.0.content"),
        ({"input": [{"type": "reasoning", "content": [{"text": 5}]}]}, "input.0.content.text"),
        ({"input": [5]}, "input"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {"x" * 65: "a"}}, "metadata"),
        ({"background": True, "reasoning": {"x": "x" * 2**20}}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"background": True, "store": False}, "background"),
        ({"background": "later"}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"temperature": 3}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_what_is_refused(run_server: RunServer, fields: dict[str, Any], param: str) -> None:
    async with run_server() as server:
        answer = await ask(server, **{"given": fields.pop("input", "say no"), **fields})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


async def test_a_stream_that_fails(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.lost = InternalError("the engine lost this request")
        *_, last = events_of(await ask(server, stream=True))

    assert last["type"] == "response.failed"
    assert last["response"]["error"]["message"] == "the engine lost this request"


@pytest.mark.feature("Clients", "OpenAI's for Python")
async def test_the_openai_client(run_server: RunServer, model: TextModel) -> None:
    async with run_server(model=model) as server:

        def use() -> tuple[Any, Any, Any]:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=10) as client:
                asked = {"model": "demo", "input": f"say <think>hm</think>Look! {CALL}", "tools": [TOOL]}
                whole = client.responses.create(**asked)
                with client.responses.stream(**asked) as stream:
                    for _ in stream:
                        pass
                    streamed = stream.get_final_response()
                again = client.responses.retrieve(whole.id)
                client.responses.delete(whole.id)
                return whole, streamed, again

        whole, streamed, again = await trio.to_thread.run_sync(use)

    for response in (whole, streamed, again):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        assert response.output_text == "Look!"
        assert json.loads(response.output[2].arguments) == {"city": "Paris"}
