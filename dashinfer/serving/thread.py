"""An engine in a trio loop in a thread of its own, for callers that have no loop, or another one.

Owns the thread and the order of its start and end: the caller waits for either, and whatever a call is given comes back as its
result or error. Knows nothing of requests. The thread is a daemon, so a process that forgets to close it can end; workers end
with their sockets then.
"""

import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import trio

from dashinfer.config import ServerConfig
from dashinfer.errors import DashInferError, EngineUnavailable, WorkerError
from dashinfer.serving import log
from dashinfer.serving.backend import Backend, RunnableEngine
from dashinfer.serving.cli import version
from dashinfer.serving.progress import Display, report_progress
from dashinfer.serving.service import Service, TextModel
from dashinfer.sources import ModelSource
from dashinfer.types import Ready

T = TypeVar("T")

CLOSING = 10.0  # seconds that the end of the workers may take
INTERRUPTING = 5.0  # seconds that the end of a call may take that nobody waits for any more
ATTENTIVE = 0.5  # seconds after which a wait begins again: a signal that comes just before it does would not be noticed in it


class _Call:
    """Work for the loop, and what came of it."""

    def __init__(self, work: Callable[[Service], Awaitable[Any]]) -> None:
        self.work = work
        self.scope = trio.CancelScope()
        self.future: Future[Any] = Future()

    async def run(self, service: Service) -> None:
        try:
            with self.scope:
                self.future.set_result(await self.work(service))
        except Exception as error:
            self.future.set_exception(error)
        finally:
            self.give_up(EngineUnavailable("the engine ended before the call was done"))

    def give_up(self, error: Exception) -> None:
        """Where nothing came of it."""
        if not self.future.done():
            self.future.set_exception(error)


class EngineThread:
    """The thread with its loop. All methods may be called from any thread."""

    def __init__(self, config: ServerConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._scope = trio.CancelScope()
        self._send, self._receive = trio.open_memory_channel[_Call](float("inf"))
        self._lock = threading.Lock()  # over the next two
        self._calls: set[_Call] = set()
        self._end: Exception | None = None
        self._token: Future[trio.lowlevel.TrioToken] = Future()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="dashinfer", daemon=True)

    def start(self, display: Display) -> None:
        """Returns once the model is loaded.

        Raises:
            StartupError, WorkerError: it cannot be; nothing is left then.
        """
        self._display = display
        self._thread.start()
        try:
            _outcome(self._ready)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers and the thread. Calls that have not returned get an EngineUnavailable. May be repeated."""
        if self._thread is threading.current_thread():  # whoever forgot to close it was collected here
            self._scope.cancel()
        elif self._thread.is_alive():
            with suppress(trio.RunFinishedError):
                self._token.result().run_sync_soon(self._scope.cancel)
            self._thread.join(CLOSING)

    def call(self, work: Callable[[Service], Awaitable[T]]) -> T:
        """What `work` returns or raises, which runs in the loop. An exception here, such as Ctrl-C's, cancels it.

        Raises:
            EngineUnavailable: the engine has ended, or ends.
        """
        call = _Call(work)
        with self._lock:
            if self._end is not None:
                raise EngineUnavailable(f"the engine has ended: {log.describe(self._end)}") from self._end
            self._calls.add(call)
        token = self._token.result()
        try:
            with suppress(trio.RunFinishedError):  # the thread is about to tell the call
                token.run_sync_soon(partial(self._begin, call))
            return _outcome(call.future)
        except BaseException:
            if not call.future.done():
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(call.scope.cancel)
                wait([call.future], INTERRUPTING)
            raise
        finally:
            with self._lock:
                self._calls.discard(call)

    def _begin(self, call: _Call) -> None:
        with suppress(trio.BrokenResourceError):  # as above
            self._send.send_nowait(call)

    def _run(self) -> None:
        end: Exception = EngineUnavailable("it was closed")
        try:
            trio.run(self._live)
        except Exception as error:
            end = _cause(error)
        with self._lock:
            self._end = end
            calls = list(self._calls)
        for call in calls:
            call.give_up(EngineUnavailable(f"the engine has ended: {log.describe(end)}"))
        if not self._ready.done():
            self._ready.set_exception(end)

    async def _live(self) -> None:
        self._token.set_result(trio.lowlevel.current_trio_token())
        with self._scope, self._receive:
            service = Service(self._config, version=version())
            report = self._display.report
            source = await trio.to_thread.run_sync(self._backend.resolve, self._config, report, abandon_on_cancel=True)
            engine = self._backend.engine(self._config, source, partial(report_progress, self._display))
            async with trio.open_nursery() as nursery:
                text = await self._load(nursery, engine, source)
                service.ready(engine, text)
                self._ready.set_result(None)
                async for call in self._receive:
                    nursery.start_soon(call.run, service)

    async def _load(self, nursery: trio.Nursery, engine: RunnableEngine, source: ModelSource) -> TextModel:
        text: TextModel | None = None

        async def load_text() -> None:
            nonlocal text
            text = await trio.to_thread.run_sync(self._backend.text, self._config, source, abandon_on_cancel=True)

        async with trio.open_nursery() as loading:
            loading.start_soon(load_text)
            await nursery.start(_keep, engine)
        assert text is not None, "the nursery ended without it"
        return text


async def _keep(engine: RunnableEngine, *, task_status: trio.TaskStatus[Ready]) -> None:
    await engine.run(task_status=task_status)
    raise WorkerError("the engine ended by itself")


def _outcome(future: Future[T]) -> T:
    """Its result or error, once it is there. Ctrl-C ends the wait."""
    while not wait([future], ATTENTIVE).done:
        pass
    return future.result()


def _cause(error: Exception) -> Exception:
    """The first error of ours in a group, if there is one."""
    leaves = log.leaves(error)
    return next((leaf for leaf in leaves if isinstance(leaf, DashInferError)), error)
