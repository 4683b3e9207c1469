"""One request of the Responses API: a chat whose turns are kept, within bounds, so that later ones can go on from them."""

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from dashinfer.errors import InvalidRequest, NotFound, RequestError
from dashinfer.protocol import responses as protocol
from dashinfer.protocol.chat import ChatCompletionRequest, ChoiceFinish
from dashinfer.protocol.parse import parse_request
from dashinfer.serving import chat
from dashinfer.serving.context import key_name
from dashinfer.serving.service import Service
from dashinfer.text.tools.events import CallBegin

MAX_KEPT = 4096  # responses
MAX_KEPT_BYTES = 64 * 1024 * 1024  # of all responses and their conversations, as JSON

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(list[protocol.Item]).decode


@dataclass(frozen=True)
class Kept:
    """A response and what it was made of. Items are kept as JSON: as objects they can take thirty times as much.

    Attributes:
        body: its JSON.
        given: JSON arrays of the items of this turn's input and of the turns before it, their outputs too.
        output: a JSON array of what the model answered.
    """

    body: bytes
    given: tuple[bytes, ...]
    output: bytes

    @property
    def size(self) -> int:
        return len(self.body) + sum(map(len, self.given)) + len(self.output)

    def input_items(self) -> list[protocol.Item]:
        return [item for turn in self.given for item in _decode(turn)]

    @property
    def conversation(self) -> tuple[bytes, ...]:
        return (*self.given, self.output)


class ResponseStore:
    """Responses by the key that asked for them, and their id; the least recently used go first. For any thread."""

    def __init__(self, *, most: int = MAX_KEPT, most_bytes: int = MAX_KEPT_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[tuple[bytes, str], Kept] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def put(self, owner: bytes, id: str, kept: Kept) -> None:
        """Keep one. A conversation that is larger than all the room is not kept."""
        if kept.size > self._most_bytes:
            return
        with self._lock:
            self._kept[owner, id] = kept
            self.bytes += kept.size
            while self.bytes > self._most_bytes or len(self._kept) > self._most:
                _, gone = self._kept.popitem(last=False)
                self.bytes -= gone.size

    def get(self, owner: bytes, id: str, *, param: str | None = None) -> Kept:
        """Raises NotFound."""
        with self._lock:
            if (found := self._kept.get((owner, id))) is None:
                raise NotFound(f"there is no response {id[:100]!r}, or it is kept no more", param=param)
            self._kept.move_to_end((owner, id))
        return found

    def delete(self, owner: bytes, id: str) -> None:
        """Raises NotFound."""
        found = self.get(owner, id)
        with self._lock:
            if self._kept.pop((owner, id), None) is not None:
                self.bytes -= found.size


@dataclass
class _Turn:
    """What reading a request finds. `given`: as `Kept.given`."""

    request: protocol.ResponsesRequest
    given: tuple[bytes, ...]


class ResponseAnswer:
    """A request the engine has accepted; answer it with either `body` or `events`.

    Attributes:
        request: the chat that it became.
        id: of the answer.
    """

    def __init__(self, service: Service, store: ResponseStore, turn: _Turn, completion: chat.ChatCompletion) -> None:
        self.request = completion.request
        self._completion, self._store, self._turn = completion, store, turn
        self._owner = key_name.get()
        self.id = _new_id("resp_")
        self._encoder = protocol.ResponseEncoder(
            turn.request, id=self.id, created=int(time.time()), model=service.config.model_name, new_id=_new_id
        )

    @property
    def summary(self) -> str:
        return self._completion.summary

    @property
    def finish_reasons(self) -> list[ChoiceFinish | None]:
        """As `ChatCompletion` has them."""
        return self._completion.finish_reasons

    async def body(self) -> bytes:
        """The whole response as JSON. Raises InternalError or EngineUnavailable where the engine lost it."""
        while (events := await self._completion.receive()) is not None:
            self._encode(events)
        self._encoder.close(self._completion.outcome[0])
        return self._keep()

    async def events(self) -> AsyncIterator[bytes]:
        """The response as server-sent events. An engine's failure is the last of them."""
        yield self._encoder.start()
        try:
            while (events := await self._completion.receive()) is not None:
                if events:
                    yield self._encode(events)
        except RequestError as error:
            yield self._encoder.failed(error)
            return
        last = self._encoder.end(self._completion.outcome[0], self._usage())
        self._keep()
        yield last

    def _encode(self, events: list[Any]) -> bytes:
        new_id = self._completion.new_call_id
        return b"".join(self._encoder.add(event, new_id() if isinstance(event, CallBegin) else None) for event in events)

    def _usage(self) -> dict[str, Any]:
        completion = self._completion
        _, _, tokens = completion.outcome
        return protocol.usage(completion.prompt_tokens, completion.cached_tokens, tokens, completion.reasoning_tokens)

    def _keep(self) -> bytes:
        body = self._encoder.body(self._completion.outcome[0], self._usage())
        if self._turn.request.store:
            self._store.put(self._owner, self.id, Kept(body, self._turn.given, _encode(self._encoder.output)))
        return body


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


async def start(service: Service, store: ResponseStore, body: chat.Buffer, stack: ExitStack) -> ResponseAnswer:
    """Hand a request to the engine; as `chat.start`. Raises RequestError."""
    turns: list[_Turn] = []
    completion = await chat.start(service, body, stack, read=partial(_read, store, key_name.get(), turns))
    (turn,) = turns
    return ResponseAnswer(service, store, turn, completion)


def _read(store: ResponseStore, owner: bytes, turns: list[_Turn], service: Service, body: chat.Buffer) -> ChatCompletionRequest:
    request = parse_request(protocol.ResponsesRequest, body)
    service.check_model(request.model)
    before: tuple[bytes, ...] = ()
    if (previous := request.previous_response_id) is not None:
        before = store.get(owner, previous, param="previous_response_id").conversation
    turns.append(_Turn(request, (*before, _encode(request.items()))))
    return request.chat([item for turn in before for item in _decode(turn)])


def cancel(store: ResponseStore, id: str) -> bytes:
    """Raises NotFound, and InvalidRequest: what is kept has ended."""
    store.get(key_name.get(), id)
    raise InvalidRequest("only a response in the background can be cancelled; end others by closing the connection")
