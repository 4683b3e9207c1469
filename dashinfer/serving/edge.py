"""The ASGI layer around the application: what every request passes, whatever route it takes or fails to take.

It gives each request an id, checks its key and what that may use, counts it, logs it when it ends, and ends the request's
generation then at the latest. While an answer is sent it watches the clock: for clients that do not read, and for silences in
which a proxy would cut the connection. Looks at `scope["path"]` only, never at an address rebuilt from headers. Knows nothing
of routes and bodies.
"""

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import trio

from dashinfer.errors import ConfigurationError, InternalError, RequestError
from dashinfer.serving.auth import KeyRing
from dashinfer.serving.context import arrival, client, key_name, lease, request_id, trace, trace_failure
from dashinfer.serving.cors import Cors, Headers
from dashinfer.serving.limits import Limiter, Limits
from dashinfer.serving.log import log_access
from dashinfer.serving.refusals import is_anthropic, refusal
from dashinfer.serving.service import Service

if TYPE_CHECKING:
    from dashinfer.serving.tracing import RequestTrace
    from dashinfer.vision.budget import MediaAccount

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

SCOPE_KEY = "dashinfer.request"
CLIENT_GONE = 499  # in the access log only: the client left before it had a status
UPLOAD_PATIENCE = 5.0  # seconds that a refused client gets to finish its upload, or it would never read the refusal
KEEP_ALIVE = 15.0  # seconds of silence after which an answer that has a sign of life sends it
WRITE_PATIENCE = 60.0  # seconds a write may wait for a client that does not read

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass
class RequestRecord:
    """One request's own things, in the scope under SCOPE_KEY.

    Attributes:
        id: the X-Request-ID, the client's own where it sent a sane one.
        stack: closed before the last of the answer is sent, or when the request ends for another reason: a generation is
            entered here.
        keep_alive: sent in long silences of an answer that has begun; empty where its format has nothing to say.
        describe: what the access log's line says besides, asked for when the request has ended.
        account: pays for a large body, where images are taken.
        headers: that the answer carries, whatever it is.
        make_room: awaited with the bytes of the body so far, before more are read.
    """

    id: str
    stack: ExitStack = field(default_factory=ExitStack)
    keep_alive: bytes = b""
    describe: Callable[[], str] | None = None
    account: "MediaAccount | None" = None
    headers: Headers = field(default_factory=list)
    make_room: Callable[[int], Awaitable[None]] | None = None


class _Exchange:
    """One request and its answer, watched from outside."""

    def __init__(self, receive: Receive, send: Send, record: RequestRecord) -> None:
        self._receive, self._send = receive, send
        self._record = record
        self._uploaded = trio.Event()  # or the client is gone
        self._received = 0  # bytes of the body
        self._writing = False
        self._since = 0.0  # trio's time at which the current write began, or the last one ended
        self._keep_alive_sent: trio.Event | None = None  # while one is being sent
        self.status = 0
        self.complete = False

    async def receive(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        if self._record.make_room is not None and message.get("more_body", False):
            await self._record.make_room(self._received)
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._uploaded.set()
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            # Answering while the client still sends would close the connection under it: a reset, and no answer is read.
            with trio.move_on_after(UPLOAD_PATIENCE):
                await self._uploaded.wait()
            self.status = message["status"]
            identity = (b"x-request-id", self._record.id.encode())
            message["headers"] = [*message["headers"], identity, *self._record.headers]
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True  # before it is sent: Hypercorn may end the request from inside of that call
            self._record.stack.close()  # and the client's next request must find everything free
        if self._keep_alive_sent is not None:
            await self._keep_alive_sent.wait()
        self._writing, self._since = True, trio.current_time()
        await self._send(message)
        self._writing, self._since = False, trio.current_time()

    async def watch(self) -> None:
        """Keep both deadlines of the answer until cancelled.

        A task of its own, because a cancel scope around each write is a tenth of what a token costs.

        Raises:
            trio.TooSlowError: a write has waited for `WRITE_PATIENCE`.
        """
        while True:
            now = trio.current_time()
            # No longer than either deadline, so that whatever begins during the sleep is due after it.
            wake = now + min(KEEP_ALIVE, WRITE_PATIENCE)
            if self._writing:
                if now >= (due := self._since + WRITE_PATIENCE):
                    raise trio.TooSlowError
                wake = min(wake, due)
            elif self._record.keep_alive and self.status and not self.complete:
                if now >= (due := self._since + KEEP_ALIVE):
                    await self._send_keep_alive()
                    continue
                wake = min(wake, due)
            await trio.sleep_until(wake)

    async def _send_keep_alive(self) -> None:
        self._keep_alive_sent = trio.Event()
        with trio.fail_after(WRITE_PATIENCE):
            await self._send({"type": "http.response.body", "body": self._record.keep_alive, "more_body": True})
        self._since = trio.current_time()
        self._keep_alive_sent.set()
        self._keep_alive_sent = None

    async def refuse(self, path: str, error: RequestError) -> None:
        """Answer without the application. `path`: as of `refusal`."""
        named, body = refusal(path, error, self._record.id)
        headers = [(name.encode(), value.encode()) for name, value in named.items()]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.answer(error.status, headers, body)

    async def answer(self, status: int, headers: Headers, body: bytes = b"") -> None:
        """Send a whole answer, once the request is there."""
        with trio.move_on_after(UPLOAD_PATIENCE):
            while not self._uploaded.is_set():
                await self.receive()
        self._uploaded.set()
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


Admit = Callable[[Scope, RequestRecord], Awaitable[None]]


async def _admit_all(scope: Scope, record: RequestRecord) -> None:
    """Nobody waits."""


def _none_free(path: str) -> bool:
    """Every path counts."""
    return False


class Edge:
    """Wraps an ASGI application.

    Args:
        keys: who may pass.
        admit: awaited before a request's body is read; may raise RequestError.
        operations: what requests are traced as, by their path, where any are.
        is_free: whether a path, which may want a key, has no limits.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        keys: KeyRing,
        admit: Admit = _admit_all,
        operations: Mapping[str, str] = MappingProxyType({}),
        is_free: Callable[[str], bool] = _none_free,
    ) -> None:
        self._app, self._service, self._keys, self._admit = app, service, keys, admit
        self._operations, self._is_free = operations, is_free
        self._limiter = Limiter(time.monotonic)
        self._cors = Cors(service.config.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _mount(scope, self._service.config.root_path)
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        record = RequestRecord(given.decode() if _SANE_ID.fullmatch(given) else "req-" + secrets.token_hex(12))
        scope[SCOPE_KEY] = record
        if is_anthropic(mounted_path(scope)):
            record.headers.append((b"request-id", record.id.encode()))  # where its clients look
        exchange = _Exchange(receive, send, record)
        began = time.monotonic()
        arrival.set(began)
        request_id.set(record.id)
        traced = self._begin_trace(scope, record, began)
        with self._service.request():
            try:
                with record.stack:
                    await self._answer(scope, exchange)
            except Exception as error:
                trace_failure(error)
                raise
            finally:
                target = scope.get("raw_path") or scope["path"].encode("ascii", "backslashreplace")
                notes = [record.describe()] if record.describe is not None else []
                if exchange.status and not exchange.complete:
                    notes.append("cut short")
                status = exchange.status or CLIENT_GONE
                log_access(scope["method"], target, status, time.monotonic() - began, "; ".join(notes), record.id)
                self._service.metrics.answered(scope["method"], mounted_path(scope), status)
                if traced is not None:
                    traced.end(exchange.status, complete=exchange.complete)

    def _begin_trace(self, scope: Scope, record: RequestRecord, began: float) -> "RequestTrace | None":
        if self._service.tracing is None or scope["method"] != "POST":
            return None
        route = mounted_path(scope)
        if (operation := self._operations.get(route)) is None:
            return None
        traced = self._service.tracing.begin(operation, route, scope, record.id, began)
        trace.set(traced)
        return traced

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(exchange.watch)
                scope[SCOPE_KEY].headers += self._cors.headers(scope["headers"])
                if (preflight := self._cors.preflight(scope["method"], scope["headers"])) is not None:
                    await exchange.answer(204, preflight)
                    nursery.cancel_scope.cancel()
                    return
                try:
                    self._let_in(scope, scope[SCOPE_KEY])
                    await self._admit(scope, scope[SCOPE_KEY])
                except RequestError as error:
                    trace_failure(error)
                    await exchange.refuse(mounted_path(scope), error)
                else:
                    await self._app(scope, exchange.receive, exchange.send)
                nursery.cancel_scope.cancel()
        except* trio.TooSlowError:
            logger.warning("request %s: the client stopped reading; gave it up", scope[SCOPE_KEY].id)

    def _let_in(self, scope: Scope, record: RequestRecord) -> None:
        """Check the key, and what it may use. Raises AuthenticationFailed, RateLimitExceeded."""
        path = mounted_path(scope)
        name = self._keys.check(path, scope["headers"])
        key_name.set(name)
        client.set(name or (scope.get("client") or (None,))[0])
        limits = self._keys.limits_of(name)
        if scope["method"] != "POST" or self._is_free(path) or self._keys.is_open(path) or limits == Limits():
            return
        held, headers = self._limiter.admit(name, limits)
        record.stack.callback(held.release)
        record.headers += [(key.encode(), value.encode()) for key, value in headers.items()]
        lease.set(held)

    def reload_keys(self) -> None:
        """Read the file with the keys again, if there is one. What is wrong with it is logged, and the keys stay."""
        try:
            count = self._keys.reload()
        except ConfigurationError as error:
            logger.error("the keys stay as they are: %s", error)
            return
        self._limiter.keep(self._keys.names)
        logger.info("%d API keys", count)


def _mount(scope: Scope, root: str) -> None:
    """Make the path one below `root_path`, as ASGI has it, where a proxy has taken that off."""
    scope["path"] = scope["path"] or "/"  # of a target such as `?x=1`, which is none: the framework wants a path
    root = scope["root_path"] = scope.get("root_path") or root
    if root and not scope["path"].startswith(root + "/"):
        scope["path"] = root + scope["path"]


def mounted_path(scope: Scope) -> str:
    """The path below `root_path`, where the server put us below one."""
    root: str = scope.get("root_path", "")
    path: str = scope["path"]
    return path[len(root) :] if root and path.startswith(root) else path


def internal_error(record: RequestRecord) -> InternalError:
    """What a client is told of a bug: where to look, and nothing else."""
    return InternalError(f"internal server error; the server's log has the details under request id {record.id}")
