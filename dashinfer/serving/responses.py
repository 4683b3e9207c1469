"""The Responses API: chats whose turns are kept, within bounds, so that later ones can go on from them.

A request is bound to its handler's scope, as any other is, but for one in the background: that is bound to the server's
`Background`, goes on holding what its key may use, and ends by itself, by being cancelled or deleted, or with the server.
"""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import msgspec
import trio

from dashinfer.errors import InternalError, InvalidRequest, NotFound, RequestError
from dashinfer.protocol import responses as protocol
from dashinfer.protocol.chat import ChatCompletionRequest, ChoiceFinish
from dashinfer.protocol.parse import parse_request
from dashinfer.protocol.response_encoder import ResponseEncoder, Status, status_of, usage_of
from dashinfer.serving import chat
from dashinfer.serving.context import key_name, lease, request_id, trace, trace_failure
from dashinfer.serving.event_log import EventLog
from dashinfer.serving.response_store import Kept, ResponseStore, items_of, raw_items_of
from dashinfer.serving.service import Service
from dashinfer.text.tools.events import CallBegin

logger = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class _Turn:
    """What reading a request finds.

    Attributes:
        before: JSON arrays of the items of the turns before it.
        own: a JSON array of this turn's input.
    """

    request: protocol.ResponsesRequest
    before: tuple[bytes, ...]
    own: bytes

    @property
    def given(self) -> tuple[bytes, ...]:
        return (*self.before, self.own)

    def chat(self, service: Service, body: chat.Buffer) -> ChatCompletionRequest:
        """For `chat.start`. Raises InvalidRequest."""
        return self.request.chat(items_of(self.before))


class ResponseAnswer:
    """A request the engine has accepted; answer it with either `body` or `events`.

    Attributes:
        id: the response's.
        request: the chat that it became.
        status: how it ended; "cut off" before.
        kept: what is to be kept of it, once it has ended.
    """

    def __init__(
        self, service: Service, turn: _Turn, completion: chat.ChatCompletion, *, keep: Callable[[str, Kept], None]
    ) -> None:
        """`keep`: called with id and `kept`, where that is to be kept."""
        self.id = _new_id("resp_")
        self.request = completion.request
        self.status: Status | Literal["cut off"] = "cut off"
        self.kept: Kept | None = None
        self._completion, self._turn, self._keep = completion, turn, keep
        self._encoder = ResponseEncoder(
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
        self._complete()
        assert self.kept is not None, "it has ended"
        return self.kept.body

    def body_so_far(self) -> bytes:
        """The unfinished response as JSON."""
        return self._encoder.body("in_progress" if self._completion.begun else "queued")

    async def events(self) -> AsyncIterator[bytes]:
        """The response as server-sent events. An engine's failure is the last of them."""
        yield self._encoder.queued() if self._turn.request.background else self._encoder.start()
        begun = not self._turn.request.background
        try:
            while (events := await self._completion.receive()) is not None:
                first = b"" if begun else self._encoder.begun()
                begun = True
                if encoded := first + self._encode(events):
                    yield encoded
        except RequestError as error:
            yield self.end("failed", error=error)
            return
        yield self._complete()

    def end(self, status: Status, usage: dict[str, Any] | None = None, error: RequestError | None = None) -> bytes:
        """The last events of a response that ends so."""
        self.status = status
        last = self._encoder.end(status, usage, error)
        request = self._turn.request
        body = self._encoder.body(status, usage, error)
        self.kept = Kept(body, self._turn.given, _encode(self._encoder.output), background=request.background)
        if request.store:
            self._keep(self.id, self.kept)
        return last

    def _complete(self) -> bytes:
        completion = self._completion
        finish, _, tokens = completion.outcome
        usage = usage_of(completion.prompt_tokens, completion.cached_tokens, tokens, completion.reasoning_tokens)
        return self.end(status_of(finish), usage)

    def _encode(self, events: list[Any]) -> bytes:
        new_id = self._completion.new_call_id
        return b"".join([self._encoder.add(event, new_id() if isinstance(event, CallBegin) else None) for event in events])


class BackgroundResponse:
    """A response that goes on when the request for it has ended.

    Attributes:
        id: the response's.
        request: the chat that it became.
        given: as `Kept.given`.
        ended: set when it has ended and what there is to keep is kept.
        log: its events, if it was asked for with `stream`.
    """

    def __init__(self, service: Service, turn: _Turn, completion: chat.ChatCompletion, *, keep: Callable[[str, Kept], None]):
        self._answer = ResponseAnswer(service, turn, completion, keep=lambda id, kept: None)
        self.id, self.request, self.given = self._answer.id, completion.request, turn.given
        self.log = EventLog() if turn.request.stream else None
        self.ended = trio.Event()
        self._service, self._keep = service, keep
        self._scope = trio.CancelScope()
        self._dropped = False
        self._status = "begun"  # for the log

    @property
    def summary(self) -> str:
        return f"{self.id} in the background: {self._status}; {self._answer.summary}"

    @property
    def finish_reasons(self) -> list[ChoiceFinish | None]:
        """As `ChatCompletion` has them."""
        return self._answer.finish_reasons

    async def body(self) -> bytes:
        """The response as it is now, as JSON."""
        kept = self._answer.kept
        return self._answer.body_so_far() if kept is None else kept.body

    def events(self) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        assert self.log is not None, "asked for with `stream`"
        return self.log.follow(-1)

    def cancel(self) -> None:
        """End it; what there is of it is kept."""
        self._scope.cancel()

    def drop(self) -> None:
        """End it, and keep nothing."""
        self._dropped = True
        self._scope.cancel()

    async def run(self, life: ExitStack) -> None:
        """Until it has ended. `life`: closed then."""
        with self._service.request(), life:
            try:
                with self._scope:
                    async for events in self._answer.events():
                        self._log(events)
                if self._answer.kept is None:
                    self._log(self._answer.end("cancelled"))
            except Exception as error:  # as of a handler: the end of one request, and not of the server
                trace_failure(error)
                logger.error("response %s failed", self.id, exc_info=error)
                said = f"internal server error; the server's log has the details under {self.id}"
                self._log(self._answer.end("failed", error=InternalError(said)))
            finally:
                self._finish()

    def _log(self, events: bytes) -> None:
        if self.log is not None:
            self.log.append(events)

    def _finish(self) -> None:
        if self.log is not None:
            self.log.end()
        self._status = "dropped" if self._dropped else self._answer.status
        if (kept := self._answer.kept) is not None and not self._dropped:
            self._keep(self.id, replace(kept, events=self.log))
        self.ended.set()
        logger.info("response %s %s", self.summary, request_id.get())


class Responses:
    """All of one server: those that are kept, and those that run in the background."""

    def __init__(self, service: Service, store: ResponseStore | None = None) -> None:
        self.store = store or ResponseStore()
        self._service = service
        self._running: dict[tuple[bytes, str], BackgroundResponse] = {}

    async def start(self, body: chat.Buffer, stack: ExitStack) -> ResponseAnswer | BackgroundResponse:
        """Hand a request to the engine; as `chat.start`. Raises RequestError."""
        service, owner = self._service, key_name.get()
        turn = await service.off_the_loop(len(body), partial(self._read, owner, body))
        size = len(body) + sum(map(len, turn.before))
        if not turn.request.background:
            completion = await self._begin(turn, stack, size)
            return ResponseAnswer(service, turn, completion, keep=partial(self.store.put, owner))
        service.background.check()
        with ExitStack() as life:
            if (traced := trace.get()) is not None:
                traced.hold()
                life.callback(traced.let_go)
            completion = await self._begin(turn, life, size)
            if (held := lease.get()) is not None:
                life.callback(held.move().release)
            response = BackgroundResponse(service, turn, completion, keep=partial(self.store.put, owner))
            service.background.check()
            self._running[owner, response.id] = response
            life.callback(self._running.pop, (owner, response.id), None)
            service.background.start(partial(response.run, life.pop_all()))
        return response

    async def _begin(self, turn: _Turn, stack: ExitStack, size: int) -> chat.ChatCompletion:
        try:
            return await chat.start(self._service, b"", stack, read=turn.chat, size=size)
        except InvalidRequest as error:
            if error.param is not None and error.param.partition(".")[0] == "messages":
                error.param = "input"
            raise

    def _read(self, owner: bytes, body: chat.Buffer) -> _Turn:
        request = parse_request(protocol.ResponsesRequest, body)
        self._service.check_model(request.model)
        request.check_told()
        before: tuple[bytes, ...] = ()
        if (previous := request.previous_response_id) is not None:
            if (owner, previous) in self._running:
                raise InvalidRequest("the response to go on from has not ended", param="previous_response_id")
            before = self._whole(owner, previous, param="previous_response_id").conversation
        return _Turn(request, before, protocol.encode_to_repeat(protocol.identified(request.items(), _new_id)))

    async def get(self, id: str) -> bytes:
        """A response as JSON. Raises NotFound."""
        if (running := self._find(id)) is not None:
            return await running.body()
        return self.store.get(key_name.get(), id).body

    def follow(self, id: str, after: int) -> AsyncIterator[bytes]:
        """Its events beyond the number `after`. Raises NotFound, and InvalidRequest where there are none."""
        running = self._find(id)
        kept = self.store.get(key_name.get(), id) if running is None else None
        if kept is not None and "events" in kept.without:
            raise NotFound(f"the events of {id!r} took too much to be kept; the response itself is kept", param="stream")
        log = running.log if kept is None else kept.events
        if log is None:
            raise InvalidRequest("only what was asked for with `background` and `stream` can be streamed", param="stream")
        return log.follow(after)

    async def input_items(self, id: str, page: protocol.Page) -> bytes:
        """A page of what it was an answer to, as JSON. Raises NotFound, InvalidRequest."""
        running = self._find(id)
        given = self._whole(key_name.get(), id).given if running is None else running.given
        return await self._service.off_the_loop(sum(map(len, given)), lambda: page.body(raw_items_of(given)))

    def delete(self, id: str) -> None:
        """Keep it no more; one that runs ends. Raises NotFound."""
        if (running := self._running.pop((key_name.get(), id), None)) is not None:
            running.drop()
        else:
            self.store.delete(key_name.get(), id)

    async def cancel(self, id: str) -> bytes:
        """End a response in the background, if it has not ended by itself: the response as JSON.

        Raises:
            NotFound: there is none.
            InvalidRequest: it is none in the background.
        """
        if (running := self._find(id)) is not None:
            running.cancel()
            await running.ended.wait()
            return await running.body()
        kept = self.store.get(key_name.get(), id)
        if not kept.background:
            raise InvalidRequest("only a response in the background can be cancelled; end others by closing the connection")
        return kept.body

    def keep(self, owners: set[bytes]) -> None:
        """Forget other keys' responses; those that run end."""
        for owner, id in [key for key in self._running if key[0] not in owners]:
            self._running.pop((owner, id)).drop()
        self.store.keep(owners)

    def _find(self, id: str) -> BackgroundResponse | None:
        return self._running.get((key_name.get(), id))

    def _whole(self, owner: bytes, id: str, *, param: str | None = None) -> Kept:
        """One whose conversation is kept. Raises NotFound."""
        kept = self.store.get(owner, id, param=param)
        if "conversation" in kept.without:
            raise NotFound(f"the conversation of {id!r} took too much to be kept; the response itself is kept", param=param)
        return kept


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)
