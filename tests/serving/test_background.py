"""Responses in the background. The model's output is what the prompt tells it to say."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio
import trio.testing

from dashinfer.errors import InternalError
from dashinfer.protocol.response_encoder import ResponseObject
from dashinfer.serving.background import Background
from dashinfer.text.detokenizer import IncrementalDetokenizer

from .conftest import Running, RunServer
from .process import PATIENCE, running, server_command

pytestmark = pytest.mark.feature("Endpoints", "Responses in the background")

PATH = "/v1/responses"
ENDED = ("completed", "incomplete", "failed", "cancelled")


async def ask(server: Running, given: str = "say hi", **fields: Any) -> httpx.Response:
    return await server.client.post(PATH, json={"model": "demo", "input": given, "background": True, **fields})


async def get(server: Running, id: str, **query: Any) -> httpx.Response:
    return await server.client.get(f"{PATH}/{id}", params=query)


async def ended(server: Running, id: str) -> dict[str, Any]:
    with trio.fail_after(10):
        while (found := (await get(server, id)).json())["status"] not in ENDED:
            await trio.sleep(0.01)
    return found


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(event.split("data: ")[1]) for event in text.removesuffix("\n\n").split("\n\n") if event]


async def test_it_goes_on_when_the_request_has_ended(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.queue_time = None
        asked = ResponseObject.model_validate_json((await ask(server, "wait abc", metadata={"a": "b"})).content)
        await server.engine.until_waiting()
        queued = (await get(server, asked.id)).json()
        server.engine.queue_time = 0.5
        begun = (await get(server, asked.id)).json()
        items = (await server.client.get(f"{PATH}/{asked.id}/input_items")).json()["data"]
        too_early = await ask(server, previous_response_id=asked.id)
        server.engine.release.set()
        done = await ended(server, asked.id)
        next_turn = await ask(server, "say on", previous_response_id=asked.id, background=False)
        await server.service.idle()

    assert (asked.status, asked.background, asked.output) == ("queued", True, [])
    assert (queued["status"], begun["status"], done["status"]) == ("queued", "in_progress", "completed")
    assert begun["output"][0]["content"][0]["text"] == "a"
    assert done["output"][0]["content"][0]["text"] == "abc"
    assert done["usage"]["output_tokens"] == 4
    assert items[0]["content"] == [{"type": "input_text", "text": "wait abc"}]
    assert (too_early.status_code, too_early.json()["error"]["param"]) == (400, "previous_response_id")
    assert next_turn.json()["output"][0]["content"][0]["text"] == "on"
    assert (server.engine.running, server.service.background.running) == (0, 0)


async def test_other_ends(run_server: RunServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_server() as server:
        cut = await ended(server, (await ask(server, "say hello", max_output_tokens=2)).json()["id"])
        server.engine.lost = InternalError("the engine lost this request")
        lost = await ended(server, (await ask(server)).json()["id"])
        server.engine.lost = None

        def broken(*given: Any) -> None:
            raise AssertionError("secret")

        monkeypatch.setattr(IncrementalDetokenizer, "push", broken)
        bug = await ended(server, (await ask(server)).json()["id"])
        monkeypatch.undo()
        after = await ended(server, (await ask(server)).json()["id"])

    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (lost["status"], lost["error"]["message"]) == ("failed", "the engine lost this request")
    assert bug["status"] == "failed"
    assert bug["id"] in bug["error"]["message"]
    assert "secret" not in json.dumps(bug)
    assert after["status"] == "completed"


@pytest.mark.parametrize("background", [True, False])
async def test_one_that_is_nested_too_deeply_to_be_repeated(run_server: RunServer, background: bool) -> None:
    def body(depth: int) -> str:
        large = " " * 8192  # is read in a thread, whose stack is short
        fields = {"model": "demo", "input": "say hi", "background": background}
        return json.dumps(fields)[:-1] + f', "reasoning": {{"x": {"[" * depth + "]" * depth}}}}}{large}'

    def item(depth: int) -> str:
        given = f'[{{"role": "user", "content": "say hi", "x": {"[" * depth + "]" * depth}}}]'
        return json.dumps({"model": "demo", "input": "?", "background": background}).replace('"?"', given)

    async with run_server() as server:
        deep = [await server.client.post(PATH, content=body(depth)) for depth in (900, 940, 960, 980)]
        deep.append(await server.client.post(PATH, content=item(980) + " " * 8192))
        fine = [await server.client.post(PATH, content=content) for content in (body(400), item(400))]
        await server.service.idle()

    assert [answer.status_code for answer in deep] == [400] * 5
    assert deep[0].json()["error"]["message"] == "the body is nested too deeply"
    assert [answer.status_code for answer in fine] == [200, 200]


async def test_a_bug_in_a_task_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise AssertionError("a bug")

    background = Background(2)
    async with trio.open_nursery() as nursery:
        await nursery.start(background.run)
        background.start(broken)
        await trio.testing.wait_all_tasks_blocked()
        after = background.running
        nursery.cancel_scope.cancel()

    assert after == 0
    assert "a bug" in caplog.text


async def test_cancelling_and_deleting(run_server: RunServer) -> None:
    async with run_server() as server:
        ids = [(await ask(server, "wait abc", stream=False)).json()["id"] for _ in range(2)]
        await server.engine.until_waiting(2)
        cancelled = await server.client.post(f"{PATH}/{ids[0]}/cancel")
        running = server.engine.running
        again = await server.client.post(f"{PATH}/{ids[0]}/cancel")
        kept = await get(server, ids[0])
        deleted = await server.client.delete(f"{PATH}/{ids[1]}")
        gone = [await get(server, ids[1]), await server.client.post(f"{PATH}/{ids[1]}/cancel")]
        await server.service.idle()
        still_gone = await get(server, ids[1])
        plain = (await ask(server, background=False)).json()["id"]
        refused = await server.client.post(f"{PATH}/{plain}/cancel")
        done = await ended(server, (await ask(server)).json()["id"])
        too_late = await server.client.post(f"{PATH}/{done['id']}/cancel")

    assert cancelled.json()["status"] == "cancelled"
    assert cancelled.json()["output"][0]["status"] == "incomplete"
    assert cancelled.json() == again.json() == kept.json()
    assert running == 1
    assert (deleted.status_code, deleted.json()["deleted"]) == (200, True)
    assert [answer.status_code for answer in (*gone, still_gone)] == [404, 404, 404]
    assert refused.status_code == 400
    assert too_late.json() == done
    assert server.engine.running == 0


def begin(url: str) -> str:
    """Leaves a stream after its first token."""
    seen, body = "", {"model": "demo", "input": "wait abc", "background": True, "stream": True}
    with httpx.stream("POST", f"{url}{PATH}", json=body, timeout=PATIENCE) as answer:
        pieces = answer.iter_text()
        while '"delta":"a"' not in seen:
            seen += next(pieces)
    return seen


async def test_a_stream_is_taken_up_again(run_server: RunServer) -> None:
    async with run_server() as server:
        first = events_of(await trio.to_thread.run_sync(begin, server.url))
        id, last = first[0]["response"]["id"], first[-1]["sequence_number"]
        server.engine.release.set()
        rest = events_of((await get(server, id, stream="true", starting_after=last)).text)
        await ended(server, id)
        all_, none, beyond = [
            events_of((await get(server, id, stream="true", **query)).text)
            for query in ({}, {"starting_after": rest[-1]["sequence_number"]}, {"starting_after": 2**31 - 1})
        ]
        whole = (await get(server, id)).json()

    assert [event["type"] for event in first[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event["response"]["status"] for event in first[:3]] == ["queued", "queued", "in_progress"]
    assert first + rest == all_
    assert [event["sequence_number"] for event in all_] == list(range(len(all_)))
    assert (all_[-1]["type"], all_[-1]["response"]) == ("response.completed", whole)
    assert none == beyond == []


async def test_a_cancelled_stream_ends(run_server: RunServer) -> None:
    async with run_server() as server:
        body, text = {"model": "demo", "input": "wait abc", "background": True, "stream": True}, ""
        async with server.client.stream("POST", PATH, json=body) as answer:
            async for piece in answer.aiter_text():
                if not text:
                    id = events_of(piece)[0]["response"]["id"]
                    await server.engine.until_waiting()
                    await server.client.post(f"{PATH}/{id}/cancel")
                text += piece

    *_, done, last = events_of(text)
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert (last["type"], last["response"]["status"]) == ("response.cancelled", "cancelled")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"stream": "true"}, "stream"),
        ({"stream": "maybe"}, "stream"),
        ({"starting_after": "1"}, "starting_after"),
        ({"stream": "true", "starting_after": "-1"}, "starting_after"),
        ({"stream": "true", "starting_after": "x"}, "starting_after"),
        ({"stream": "true", "starting_after": "9" * 5000}, "starting_after"),
    ],
)
async def test_queries_that_are_refused(run_server: RunServer, query: dict[str, str], param: str) -> None:
    async with run_server() as server:
        answer = await get(server, (await ask(server)).json()["id"], **query)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_what_is_refused_is_refused_at_once(run_server: RunServer) -> None:
    async with run_server(max_queue=4) as server:
        bad = await ask(server, temperature=9)
        not_kept = await ask(server, store=False)
        taken = [await ask(server, "wait ab") for _ in range(2)]
        full = await ask(server, "wait ab")
        in_front = await ask(server, background=False)
        server.engine.release.set()
        await server.service.idle()
        after = await ask(server)

    assert [answer.json()["error"]["param"] for answer in (bad, not_kept)] == ["temperature", "background"]
    assert [answer.status_code for answer in (*taken, full, in_front, after)] == [200, 200, 429, 200, 200]
    assert full.json()["error"]["code"] == "queue_full"


async def test_keys_and_their_limits(run_server: RunServer) -> None:
    one, two = ({"authorization": f"Bearer sk-{number}"} for number in (1, 2))
    async with run_server(api_keys=("sk-1", "sk-2"), rate_limit_concurrent=1, rate_limit_tokens=1000) as server:
        server.client.headers.update(one)
        id = (await ask(server, "wait abc", stream=False)).json()["id"]
        await server.engine.until_waiting()
        busy = await ask(server, "say no")
        others = [
            await server.client.get(f"{PATH}/{id}", headers=two),
            await server.client.get(f"{PATH}/{id}/input_items", headers=two),
            await server.client.delete(f"{PATH}/{id}", headers=two),
            await server.client.post(f"{PATH}/{id}/cancel", headers=two),
            await server.client.post(PATH, json={"model": "demo", "input": "a", "previous_response_id": id}, headers=two),
        ]
        cancelled = await server.client.post(f"{PATH}/{id}/cancel")
        await server.service.idle()
        free = await ask(server, "say yes", background=False)

    assert busy.status_code == 429
    assert [answer.status_code for answer in others] == [404] * 5
    assert cancelled.json()["status"] == "cancelled"
    assert free.status_code == 200
    used = len("user: wait abc") + 1 + 1
    assert int(free.headers["x-ratelimit-remaining-tokens"]) == pytest.approx(1000 - used, abs=2)


async def test_a_key_that_is_gone_takes_its_responses_along(run_server: RunServer, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-1\nsk-2\n")
    async with run_server(api_keys_file=keys) as server:
        server.client.headers["authorization"] = "Bearer sk-1"
        kept = (await ask(server, background=False)).json()["id"]
        running = (await ask(server, "wait abc")).json()["id"]
        await server.engine.until_waiting()
        bound: list[str] = []  # to its connection, so that it goes on

        async def ask_and_wait() -> None:
            bound.append((await ask(server, "wait abc", background=False)).json()["id"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_and_wait)
            await server.engine.until_waiting(2)
            keys.write_text("sk-2\n")
            server.service.reload_keys()
            await server.engine.until(lambda: server.engine.running == 1)
            server.engine.release.set()
        keys.write_text("sk-1\nsk-2\n")
        server.service.reload_keys()
        found = [await get(server, id) for id in (kept, running, *bound)]

    assert [answer.status_code for answer in found] == [404, 404, 404]


async def test_the_openai_client(run_server: RunServer) -> None:
    async with run_server() as server:
        server.engine.queue_time = None

        def use() -> tuple[Any, ...]:
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=10) as client:
                polled = client.responses.create(model="demo", input="say hello", background=True)
                first = polled.status
                while polled.status in ("queued", "in_progress"):
                    polled = client.responses.retrieve(polled.id)
                streamed = list(client.responses.create(model="demo", input="say hello", background=True, stream=True))
                id = streamed[0].response.id
                rest = list(client.responses.retrieve(id, stream=True, starting_after=4))
                with client.responses.stream(response_id=id, starting_after=2) as stream:
                    final = stream.get_final_response()
                waiting = client.responses.create(model="demo", input="wait abc", background=True)
                cancelled = client.responses.cancel(waiting.id)
                with pytest.raises(openai.BadRequestError):
                    client.responses.create(model="demo", input="a", background=True, store=False)
                items = list(client.responses.input_items.list(id, limit=1))
                client.responses.delete(id)
                with pytest.raises(openai.NotFoundError):
                    client.responses.retrieve(id)
                return first, polled, streamed, rest, final, cancelled, items

        first, polled, streamed, rest, final, cancelled, items = await trio.to_thread.run_sync(use)

    assert (first, polled.status, polled.output_text) == ("queued", "completed", "hello")
    assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
    assert [event.type for event in rest] == [event.type for event in streamed[5:]]
    assert final.output_text == streamed[-1].response.output_text == "hello"
    assert cancelled.status == "cancelled"
    assert [item.content[0].text for item in items] == ["say hello"]


async def test_pages_of_input_items(run_server: RunServer) -> None:
    async with run_server() as server:
        given = [{"role": "user", "content": f"say {number}"} for number in range(45)]
        answer = await server.client.post(PATH, json={"model": "demo", "input": given})
        path = f"{PATH}/{answer.json()['id']}/input_items"

        async def page(**query: Any) -> dict[str, Any]:
            return (await server.client.get(path, params=query)).json()

        first = await page()
        second = await page(after=first["last_id"], limit=24)
        third = await page(after=second["last_id"])
        forward = await page(order="asc", limit=100)
        bad = [await page(limit=0), await page(limit="x"), await page(order="up"), await page(after="nothing")]

    ids = [item["id"] for item in forward["data"]]
    assert ids[::-1] == [item["id"] for part in (first, second, third) for item in part["data"]]
    assert [len(part["data"]) for part in (first, second, third)] == [20, 24, 1]
    assert [part["has_more"] for part in (first, second, third, forward)] == [True, True, False, False]
    assert (forward["first_id"], forward["last_id"]) == (ids[0], ids[-1])
    assert [each["error"]["param"] for each in bad] == ["limit", "limit", "order", "after"]


def test_a_drain_waits_for_it_and_cuts_it_off(tmp_path: Path) -> None:
    with running(server_command(tmp_path, "--drain-timeout", "0.3")) as server:
        server.wait_ready()
        body = {"model": "demo", "input": "wait ab", "background": True}
        answer = httpx.post(f"{server.url}{PATH}", json=body, timeout=PATIENCE)
        server.wait_for(f"POST {PATH} 200")  # the request has ended, and the response goes on
        server.signal(signal.SIGTERM)
        server.wait_for("1 requests may finish")
        server.wait_for("1 requests did not finish within 0.3 s and are cut off")
        server.wait_for(f"{answer.json()['id']} in the background: failed; 14 tokens in, 1 out")
        status = server.end()

    assert status == 0
    assert "Traceback" not in "\n".join(server.said)
