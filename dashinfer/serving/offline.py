"""`LLM`: a model without a server, for scripts and notebooks. Many requests at a time, which are a server's without HTTP.

Owns the settings and lists that callers give, and how many requests are in flight. What a request is, and what is answered, is
`chat`'s and `completions`' to say: each goes to them as the body that a client would have sent.
"""

import dataclasses
import logging
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import msgspec
import trio
from pydantic import BaseModel

from dashinfer.config import ServerConfig, did_you_mean, parse_setting
from dashinfer.errors import ConfigurationError, InvalidRequest, RequestError
from dashinfer.protocol.chat import ChatCompletion
from dashinfer.protocol.completions import Completion
from dashinfer.serving import chat, completions, log
from dashinfer.serving.backend import Backend, ModelBackend
from dashinfer.serving.progress import Display, make_display
from dashinfer.serving.service import Service
from dashinfer.serving.thread import EngineThread

Message = Mapping[str, Any]
Conversation = Sequence[Message]
Prompt = str | Sequence[int]
Params = Mapping[str, Any]
R = TypeVar("R", bound=BaseModel)

_OURS = ("model", "stream", "stream_options")  # fields that mean nothing here


class _Answer(Protocol):
    async def body(self) -> bytes: ...


Start = Callable[[Service, bytes, ExitStack], Awaitable[_Answer]]


class LLM:
    """A loaded model.

    It runs until `close`, the end of a `with` block, or the end of the process. Methods may be called from several threads;
    what they are given is computed together.
    """

    def __init__(self, model: str, *, backend: Backend | None = None, **settings: Any) -> None:
        """Returns once the model is loaded, with a progress bar if standard error is a terminal, and log lines if not.

        Args:
            model: as for `--model`.
            backend: in place of the real one, for tests.
            settings: of `ServerConfig`, as values or as text (`"4GiB"`); those of HTTP have no effect. No variable but
                `DASHINFER_CACHE` is read.

        Raises:
            ConfigurationError: a setting that does not exist, or a value that cannot work.
            StartupError: the model cannot be found, served or held.
            WorkerError: a worker died while it loaded.
        """
        config = _configure({"model": model, **settings})
        if not logging.getLogger("dashinfer").handlers:
            log.configure(config.log_level, config.log_format, libraries=False)
        self._model = config.model_name
        self._places = trio.Semaphore(config.max_queue)  # so nothing is ever refused for a full queue
        thread = EngineThread(config, backend or ModelBackend())
        # At the process's end too, however it comes but by a signal that kills; workers see to that one.
        self._close = weakref.finalize(self, thread.close)
        self._thread = thread
        with make_display() as display:
            thread.start(display)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: Params | Sequence[Params] | None = None,
        *,
        progress: bool = True,
        return_errors: bool = False,
    ) -> list[Any]:
        """Answer conversations.

        Args:
            conversations: lists of messages, as in a request to `/v1/chat/completions`; or one such list.
            params: its other fields (`temperature`, `max_tokens`, `tools`, ...), for all or one mapping for each.
            progress: show how many are done.
            return_errors: put a RequestError in its answer's place, in place of raising the first.

        Returns:
            A `dashinfer.protocol.chat.ChatCompletion` for each conversation, in order.

        Raises:
            RequestError: one of the requests is at fault or failed, and the others were dropped.
        """
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]  # type: ignore[list-item]
        requests = _requests("messages", conversations, params)
        return self._answer(chat.start, requests, ChatCompletion, progress, return_errors)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        progress: bool = True,
        return_errors: bool = False,
    ) -> list[Any]:
        """Go on with texts, or lists of tokens, without a chat template.

        Args:
            prompts: one or many.
            params: the other fields of a request to `/v1/completions`, as in `chat`. `max_tokens` is 16 unless it is given.
            progress, return_errors: as in `chat`.

        Returns:
            A `dashinfer.protocol.completions.Completion` for each prompt, in order.

        Raises:
            RequestError: as `chat`.
        """
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [prompts]  # type: ignore[list-item]
        requests = _requests("prompt", prompts, params)
        return self._answer(completions.start, requests, Completion, progress, return_errors)

    def close(self) -> None:
        """End the workers. What runs in other threads gets an EngineUnavailable, and so does what is asked later."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _answer(
        self, start: Start, requests: Sequence[Params], kind: type[R], progress: bool, return_errors: bool
    ) -> list[R | RequestError]:
        bodies = [_body({"model": self._model, **request}) for request in requests]
        with make_display() if progress else nullcontext() as display:
            return self._thread.call(partial(_Batch(start, kind, self._places, display, return_errors).run, bodies))


class _Batch:
    """Requests that are answered together."""

    def __init__(
        self, start: Start, kind: type[BaseModel], places: trio.Semaphore, display: Display | None, return_errors: bool
    ) -> None:
        self._start, self._kind = start, kind
        self._places, self._display = places, display
        self._return_errors = return_errors

    async def run(self, bodies: Sequence[bytes], service: Service) -> list[Any]:
        """Raises RequestError."""
        self._answers: list[Any] = [None] * len(bodies)
        self._done = 0
        self._error: RequestError | None = None
        async with trio.open_nursery() as nursery:
            for index, body in enumerate(bodies):
                await self._places.acquire()
                nursery.start_soon(self._run_one, service, nursery.cancel_scope, index, body)
        if self._error is not None:
            raise self._error
        return self._answers

    async def _run_one(self, service: Service, scope: trio.CancelScope, index: int, body: bytes) -> None:
        try:
            with service.request(), ExitStack() as stack:
                answer = await self._start(service, body, stack)
                self._answers[index] = self._kind.model_validate_json(await answer.body())
        except RequestError as error:
            self._answers[index] = error
            if not self._return_errors and self._error is None:
                error.add_note(f"request {index} of {len(self._answers)}, counted from 0")
                self._error = error
                scope.cancel()
        finally:
            self._places.release()
        self._done += 1
        if self._display is not None:
            self._display.report("answers", self._done, len(self._answers), "")


def _configure(settings: Mapping[str, Any]) -> ServerConfig:
    """Settings from Python values, which are read as those of the command line are.

    Raises:
        ConfigurationError: see `LLM`.
    """
    fields = {field.name: field for field in dataclasses.fields(ServerConfig)}
    values = {}
    for name, value in settings.items():
        if name not in fields:
            raise ConfigurationError(f"{name!r} is not a setting" + did_you_mean(name, fields, most=2))
        if value is None:
            continue  # the default
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        try:
            values[name] = parse_setting(fields[name], text)
        except ValueError as error:
            raise ConfigurationError(f"{name}: {error}") from None
    config = ServerConfig(**values)
    if config.nnodes > 1:
        raise ConfigurationError("nnodes: several machines are served by the command dashinfer_serve alone")
    return dataclasses.replace(config, max_queue=max(config.max_queue, 2 * config.max_batch * config.data_parallel))


def _requests(name: str, contents: Sequence[Any], params: Params | Sequence[Params] | None) -> list[Params]:
    """The fields of each request, of which `name` has the content."""
    each = [params or {}] * len(contents) if params is None or isinstance(params, Mapping) else params
    if len(each) != len(contents):
        raise InvalidRequest(f"there are {len(each)} params for {len(contents)} requests", param="params")
    for fields in each:
        if wrong := fields.keys() & {name, *_OURS}:
            raise InvalidRequest(f"params have {sorted(wrong)[0]!r}, which is not theirs to set", param=sorted(wrong)[0])
    return [{name: content, **fields} for content, fields in zip(contents, each, strict=True)]


def _body(request: Params) -> bytes:
    try:
        return msgspec.json.encode(request)
    except (TypeError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"the request cannot be written as JSON: {error}") from error
