"""One request of Anthropic's Messages API: a chat with other words around it."""

import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from dashinfer.errors import InvalidRequest, RequestError
from dashinfer.protocol import anthropic as protocol
from dashinfer.protocol.chat import ChatCompletionRequest, ChoiceFinish
from dashinfer.protocol.parse import parse_request
from dashinfer.serving import chat
from dashinfer.serving.context import request_id
from dashinfer.serving.service import Service
from dashinfer.text.tools.events import CallBegin


class MessagesAnswer:
    """A request the engine has accepted; answer it with either `body` or `events`.

    Attributes:
        request: the chat that it became.
        id: of the answer.
    """

    def __init__(self, service: Service, completion: chat.ChatCompletion) -> None:
        self.request = completion.request
        self._completion = completion
        self.id = "msg_" + secrets.token_hex(12)
        self._encoder = protocol.MessageEncoder(id=self.id, model=service.config.model_name)

    @property
    def summary(self) -> str:
        return self._completion.summary

    @property
    def finish_reasons(self) -> list[ChoiceFinish | None]:
        """As `ChatCompletion` has them."""
        return self._completion.finish_reasons

    async def body(self) -> bytes:
        """The whole answer as JSON. Raises InternalError or EngineUnavailable where the engine lost it."""
        while (encoded := await self._receive()) is not None:
            del encoded  # the encoder has it
        return self._encoder.body(*self._end())

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as server-sent events. An engine's failure becomes an error event, the last one."""
        try:
            first = await self._completion.receive()  # before the prompt is computed, nobody knows what the cache had of it
            yield self._encoder.start(self._usage(0)) + self._encode(first or [])
            while (encoded := await self._receive()) is not None:
                if encoded:
                    yield encoded
        except RequestError as error:
            yield protocol.error_event(error, request_id.get())
            return
        yield self._encoder.end(*self._end())

    async def _receive(self) -> bytes | None:
        events = await self._completion.receive()
        return None if events is None else self._encode(events)

    def _encode(self, events: list[Any]) -> bytes:
        new_id = self._completion.new_call_id
        return b"".join(self._encoder.add(event, new_id() if isinstance(event, CallBegin) else None) for event in events)

    def _usage(self, output_tokens: int) -> dict[str, int]:
        return protocol.usage(self._completion.prompt_tokens, self._completion.cached_tokens, output_tokens)

    def _end(self) -> tuple[str, str | None, dict[str, int]]:
        finish, stop_string, tokens = self._completion.outcome
        return protocol.stop_reason(finish, stop_string), stop_string, self._usage(tokens)


async def start(service: Service, body: chat.Buffer, stack: ExitStack) -> MessagesAnswer:
    """Hand a request to the engine; as `chat.start`. Raises RequestError."""
    try:
        return MessagesAnswer(service, await chat.start(service, body, stack, read=_read))
    except InvalidRequest as error:
        protocol.in_our_words(error)
        raise


async def count_tokens(service: Service, body: chat.Buffer) -> bytes:
    """The answer to a `CountTokensRequest`. Raises RequestError."""
    return await service.off_the_loop(len(body), partial(_count, service, body))


def _read(service: Service, body: chat.Buffer) -> ChatCompletionRequest:
    request = parse_request(protocol.MessagesRequest, body)
    service.check_model(request.model)
    return request.chat()


def _count(service: Service, body: chat.Buffer) -> bytes:
    engine, text = service.require()
    request = parse_request(protocol.CountTokensRequest, body)
    service.check_model(request.model)
    as_chat = request.chat()
    if as_chat.has_media:
        raise InvalidRequest("tokens of images are not counted without an answer", param="messages")
    return protocol.token_count_body(chat.count_tokens(engine, text, as_chat))
