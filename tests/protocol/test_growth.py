"""What a token costs does not depend on how many came before."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from dashinfer.protocol.anthropic import MessageEncoder
from dashinfer.protocol.response_encoder import ResponseEncoder
from dashinfer.protocol.responses import ResponsesRequest
from dashinfer.text.tools.events import Arguments, CallBegin, Content, Event, Reasoning

LONG = "x" * 4_000_000  # to copy it takes many times as long as to encode a token
TOKENS = 300
KINDS: dict[str, Callable[[str], Event]] = {
    "text": Content,
    "reasoning": Reasoning,
    "arguments": lambda text: Arguments(0, text),
}


def responses() -> ResponseEncoder:
    request = ResponsesRequest(model="demo", input="a")
    return ResponseEncoder(request, id="resp_1", created=0, model="demo", new_id=lambda prefix: prefix)


def messages() -> MessageEncoder:
    return MessageEncoder(id="msg_1", model="demo")


def seconds(make: Callable[[], Any], kind: str, begin: str) -> float:
    """Of processor time for some tokens after `begin`; the least of a few."""
    found = []
    for _ in range(5):
        encoder = make()
        if kind == "arguments":
            encoder.add(CallBegin(0, "f"), "call_1")
        encoder.add(KINDS[kind](begin), None)
        token = KINDS[kind](" token")
        began = time.process_time()
        for _ in range(TOKENS):
            encoder.add(token, None)
        found.append(time.process_time() - began)
    return min(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [responses, messages])
def test_a_stream(make: Callable[[], Any], kind: str) -> None:
    assert seconds(make, kind, LONG) < 5 * seconds(make, kind, "x")


def test_a_history_of_many_items() -> None:
    def cost(begin: str) -> float:
        items = [{"type": "message", "role": "assistant", "content": begin}]
        items += [{"type": "message", "role": "assistant", "content": "token "}] * 2000
        items += [{"role": "user", "content": "a"}]
        found = []
        for _ in range(3):
            began = time.process_time()
            chat = ResponsesRequest(model="demo", input=items).chat([])
            found.append(time.process_time() - began)
        assert chat.messages[0].content == begin + "token " * 2000
        return min(found)

    assert cost(LONG) < 0.1 + 5 * cost("x")
