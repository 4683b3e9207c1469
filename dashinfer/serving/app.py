"""The routes, and how an error becomes an answer.

Every answer that is not a success, from a handler or from the framework, has OpenAI's error shape. What a handler needs comes
from `Service`; identity, keys and logging are the edge's (`edge.py`).
"""

import logging
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException

from dashinfer.errors import InvalidRequest, MethodNotAllowed, NotFound, PayloadTooLarge, RequestError
from dashinfer.protocol import anthropic as anthropic_protocol
from dashinfer.protocol import responses as responses_protocol
from dashinfer.protocol.openapi import openapi_document
from dashinfer.protocol.stream import KEEP_ALIVE, error_body
from dashinfer.serving import anthropic, chat, chat_page, completions, docs, embeddings, responses, status, tokens
from dashinfer.serving.auth import KeyRing
from dashinfer.serving.context import key_name, trace, trace_failure
from dashinfer.serving.edge import SCOPE_KEY, Edge, RequestRecord, Scope, error_headers, internal_error
from dashinfer.serving.limits import Limits
from dashinfer.serving.service import Service
from dashinfer.serving.static_files import StaticFile

logger = logging.getLogger(__name__)

# Bytes. Decoding JSON holds the interpreter's lock, which stops every stream: for this much a few milliseconds where it is one
# long string, and under a second at the worst. Text that fills a long context takes a tenth of it.
MAX_BODY = 8 * 1024 * 1024
INLINE_MEDIA = 2  # of the largest size, in base64, that a body may have room for besides, where the model sees
BODY_STEP = 4 * 1024 * 1024  # bytes of that memory that are taken at a time
PAID_BODY = 1024 * 1024  # bytes from which on a body needs memory from the budget for media, where there is one
MAX_OTHER_BODY = 16 * 1024  # bytes that are kept of a body nobody reads
BODY_TIMEOUT = 120  # seconds a client may take to send its body

CHAT_PATH = "/v1/chat/completions"
COMPLETIONS_PATH, EMBEDDINGS_PATH = "/v1/completions", "/v1/embeddings"
RESPONSES_PATH = "/v1/responses"
MESSAGES_PATH, COUNT_TOKENS_PATH = "/v1/messages", "/v1/messages/count_tokens"
TOKENIZE_PATH, DETOKENIZE_PATH = "/tokenize", "/detokenize"
BODY_PATHS = (  # that take more than a small body
    *(CHAT_PATH, COMPLETIONS_PATH, EMBEDDINGS_PATH),
    *(RESPONSES_PATH, MESSAGES_PATH, COUNT_TOKENS_PATH, TOKENIZE_PATH, DETOKENIZE_PATH),
)
OPERATIONS = {  # that are traced, by the names of OpenTelemetry's conventions for GenAI
    **dict.fromkeys((CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH), "chat"),
    **{COMPLETIONS_PATH: "text_completion", EMBEDDINGS_PATH: "embeddings"},
}
OPEN_PATHS = ("/openapi.json", *status.OPEN_PATHS, *docs.OPEN_PATHS, *chat_page.OPEN_PATHS)

_JSON = {"content-type": "application/json"}
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


Answer = chat.ChatCompletion | completions.Completions | anthropic.MessagesAnswer | responses.ResponseAnswer


class _Body(TrioRequest.body_class):
    """Hands out its buffer, which may be large, instead of a copy."""

    def __await__(self) -> Generator[Any, None, bytearray]:
        if self._must_raise is None:
            yield from self._complete.wait().__await__()
        if self._must_raise is not None:
            raise self._must_raise
        data, self._data = self._data, bytearray()
        return data


def max_body(service: Service, path: str, *, declared: bool) -> int:
    """Most bytes of a body for a path. `declared`: it says its length at once, so that memory can be had before it is read."""
    if path != CHAT_PATH or service.intake is None or not declared:
        return MAX_BODY
    return MAX_BODY + INLINE_MEDIA * (service.config.max_media_bytes * 4 // 3)


class _Request(TrioRequest):
    """Keeps a large body only where somebody reads one: the framework collects it before the route is known."""

    body_class = _Body
    service: Service

    def __init__(self, method: str, scheme: str, path: str, query: bytes, headers: Headers, *rest: Any, **named: Any) -> None:
        if method == "POST" and path in BODY_PATHS:
            named["max_content_length"] = max_body(self.service, path, declared="content-length" in headers)
        else:
            named["max_content_length"] = MAX_OTHER_BODY
        super().__init__(method, scheme, path, query, headers, *rest, **named)


def _record() -> RequestRecord:
    return request.scope[SCOPE_KEY]


def error_response(error: RequestError, *, status: int | None = None) -> Response:
    """An error as an answer. `status` overrides the error's own."""
    trace_failure(error)
    return Response(error_body(error), status or error.status, headers=error_headers(error))


def _anthropic_error(error: RequestError) -> Response:
    trace_failure(error)
    return Response(anthropic_protocol.error_body(error), error.status, headers=error_headers(error))


def _http_error(service: Service, error: HTTPException) -> Response:
    """What the framework refuses by itself: unknown routes, wrong methods, bodies too large or too slow."""
    match error.code:
        case 404:
            return error_response(NotFound(f"there is no {request.path[:200]!r} here; /docs lists what there is"))
        case 405:
            allowed = ", ".join(sorted(error.valid_methods or ()))
            response = error_response(MethodNotAllowed(f"{request.method} is not allowed here; use {allowed}"))
            response.headers["allow"] = allowed
            return response
        case 413:
            most = max_body(service, request.path, declared="content-length" in request.headers) // 2**20
            return error_response(PayloadTooLarge(f"the body is larger than {most} MiB"))
    return error_response(InvalidRequest(error.description or error.name), status=error.code)


def _unexpected(error: Exception) -> Response:
    record = _record()
    logger.error("request %s failed", record.id, exc_info=error)
    trace_failure(error)
    return error_response(internal_error(record))


async def _admit(service: Service, scope: Scope, record: RequestRecord) -> None:
    """Lets a large body wait until there is memory for it, if the model sees: it then brings images. More is taken as it comes.

    Raises QueueFull.
    """
    if service.intake is None or scope["method"] != "POST" or not scope["path"].endswith(CHAT_PATH):
        return
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    length = int(declared) if declared.isdigit() else 0
    if not PAID_BODY <= length <= max_body(service, CHAT_PATH, declared=True):
        return
    account = record.account = record.stack.enter_context(service.intake.budget.open())

    async def make_room(received: int) -> None:
        if received >= account.held and account.held < length:
            await account.take(min(BODY_STEP, length - account.held))

    await make_room(0)
    record.make_room = make_room


def create_app(service: Service) -> QuartTrio:
    """The ASGI application. It serves from the first moment: `/health` tells whether there is a model yet.

    Raises:
        ConfigurationError: the file with the keys cannot be used.
    """
    app = QuartTrio(__name__, static_folder=None)
    app.request_class = type("_Request", (_Request,), {"service": service})
    app.config.update(BODY_TIMEOUT=BODY_TIMEOUT, RESPONSE_TIMEOUT=None)
    app.url_map.merge_slashes = False
    document = openapi_document(
        title="DashInfer",
        version=service.version,
        api_keys=bool(service.config.api_keys or service.config.api_keys_file),
        model=service.config.model_name,
    )

    status.add_routes(app, service)

    store = responses.ResponseStore()

    async def answer(accepted: Answer, *, keep_alive: bytes = KEEP_ALIVE) -> Response:
        record = _record()
        record.describe = lambda: accepted.summary
        if (traced := trace.get()) is not None:
            traced.answered(accepted)
        if accepted.request.stream:
            response = Response(accepted.events(), headers=_EVENTS)
            response.timeout = None
            record.keep_alive = keep_alive
            return response
        return Response(await accepted.body(), headers=_JSON)

    @app.post(CHAT_PATH)
    async def chat_completions() -> Response:
        service.require()  # before the body is read: it may be large
        record = _record()
        return await answer(await chat.start(service, await request.get_data(), record.stack, record.account))

    @app.post(COMPLETIONS_PATH)
    async def text_completions() -> Response:
        service.require()
        return await answer(await completions.start(service, await request.get_data(), _record().stack))

    @app.post(RESPONSES_PATH)
    async def create_response() -> Response:
        service.require()
        return await answer(await responses.start(service, store, await request.get_data(), _record().stack))

    @app.get(f"{RESPONSES_PATH}/<id>")
    async def get_response(id: str) -> Response:
        return Response(store.get(key_name.get(), id).body, headers=_JSON)

    @app.delete(f"{RESPONSES_PATH}/<id>")
    async def delete_response(id: str) -> Response:
        store.delete(key_name.get(), id)
        return Response(responses_protocol.deleted_body(id), headers=_JSON)

    @app.get(f"{RESPONSES_PATH}/<id>/input_items")
    async def response_items(id: str) -> Response:
        kept = store.get(key_name.get(), id)
        return Response(responses_protocol.item_list_body(kept.input_items()), headers=_JSON)

    @app.post(f"{RESPONSES_PATH}/<id>/cancel")
    async def cancel_response(id: str) -> Response:
        return Response(responses.cancel(store, id), headers=_JSON)

    @app.post(MESSAGES_PATH)
    async def messages() -> Response:
        try:
            service.require()
            accepted = await anthropic.start(service, await request.get_data(), _record().stack)
            return await answer(accepted, keep_alive=anthropic_protocol.PING)
        except RequestError as error:
            return _anthropic_error(error)

    @app.post(COUNT_TOKENS_PATH)
    async def count_tokens() -> Response:
        try:
            service.require()
            return Response(await anthropic.count_tokens(service, await request.get_data()), headers=_JSON)
        except RequestError as error:
            return _anthropic_error(error)

    @app.post(EMBEDDINGS_PATH)
    async def embedding() -> Response:
        service.require()
        record = _record()
        body, summary = await embeddings.embeddings(service, await request.get_data(), record.stack)
        record.describe = lambda: summary
        return Response(body, headers=_JSON)

    @app.post(TOKENIZE_PATH)
    async def tokenize() -> Response:
        service.require()
        return Response(await tokens.tokenize(service, await request.get_data()), headers=_JSON)

    @app.post(DETOKENIZE_PATH)
    async def detokenize() -> Response:
        service.require()
        return Response(await tokens.detokenize(service, await request.get_data()), headers=_JSON)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return Response(tokens.tokenizer_info(service), headers=_JSON)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        servers = {"servers": [{"url": request.root_path}]} if request.root_path else {}
        return Response(msgspec.json.encode({**document, **servers}), headers=_JSON)

    @app.get("/docs")
    async def documentation() -> Response:
        return Response(docs.PAGE, headers=docs.PAGE_HEADERS)

    @app.get("/docs/<name>")
    async def documentation_file(name: str) -> Response:
        return await static_file(docs.FILES, name, docs.FILE_HEADERS)

    @app.get("/")
    async def chat_index() -> Response:
        return Response(await trio.Path(chat_page.PAGE.path).read_bytes(), headers=chat_page.PAGE_HEADERS)

    @app.get("/chat/<name>")
    async def chat_file(name: str) -> Response:
        return await static_file(chat_page.FILES, name, chat_page.FILE_HEADERS)

    async def static_file(files: Mapping[str, StaticFile], name: str, headers: Mapping[str, str]) -> Response:
        if (file := files.get(name)) is None:
            return error_response(NotFound(f"there is no {name[:200]!r} here"))
        content = await trio.Path(file.path).read_bytes()
        return Response(content, headers={"content-type": file.content_type, **headers})

    service.metrics.routes = frozenset(rule.rule for rule in app.url_map.iter_rules())
    app.register_error_handler(RequestError, error_response)
    app.register_error_handler(HTTPException, partial(_http_error, service))
    app.register_error_handler(Exception, _unexpected)
    config = service.config
    keys = KeyRing(
        config.api_keys,
        open_paths=OPEN_PATHS,
        file=config.api_keys_file,
        limits=Limits(config.rate_limit_requests, config.rate_limit_tokens, config.rate_limit_concurrent),
    )
    app.asgi_app = edge = Edge(app.asgi_app, service, keys, partial(_admit, service), OPERATIONS)
    service.reload_keys = edge.reload_keys
    return app
