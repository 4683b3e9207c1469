"""The routes, and how an error becomes an answer.

Every answer that is not a success, from a handler or from the framework, has OpenAI's error shape. What a handler needs comes
from `Service`; identity, keys and logging are the edge's (`edge.py`).
"""

import logging
from typing import Any

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest
from werkzeug.exceptions import HTTPException

from dashinfer.errors import InvalidRequest, MethodNotAllowed, NotFound, PayloadTooLarge, RequestError
from dashinfer.protocol.openapi import openapi_document
from dashinfer.protocol.stream import KEEP_ALIVE, error_body, health_body, model_list_body
from dashinfer.serving import chat, docs
from dashinfer.serving.auth import KeyRing
from dashinfer.serving.edge import SCOPE_KEY, Edge, RequestRecord, error_headers, internal_error
from dashinfer.serving.service import Service

logger = logging.getLogger(__name__)

# Bytes. Decoding JSON holds the interpreter's lock, which stops every stream: for this much under a second at the worst. Text
# that fills a long context takes a tenth of it; images, which come as base64 inside the JSON, will need more.
MAX_BODY = 8 * 1024 * 1024
MAX_OTHER_BODY = 16 * 1024  # bytes that are kept of a body nobody reads
BODY_TIMEOUT = 120  # seconds a client may take to send its body

CHAT_PATH = "/v1/chat/completions"
OPEN_PATHS = ("/", "/health", "/openapi.json", *docs.OPEN_PATHS)

_JSON = {"content-type": "application/json"}
_EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


class _Request(TrioRequest):
    """Keeps a large body only where somebody reads one: the framework collects it before the route is known."""

    def __init__(self, method: str, scheme: str, path: str, *rest: Any, max_content_length: int, **named: Any) -> None:
        if (method, path) != ("POST", CHAT_PATH):
            max_content_length = min(max_content_length, MAX_OTHER_BODY)
        super().__init__(method, scheme, path, *rest, max_content_length=max_content_length, **named)


def _record() -> RequestRecord:
    return request.scope[SCOPE_KEY]


def error_response(error: RequestError, *, status: int | None = None) -> Response:
    """An error as an answer. `status` overrides the error's own."""
    return Response(error_body(error), status or error.status, headers=error_headers(error))


def _http_error(error: HTTPException) -> Response:
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
            return error_response(PayloadTooLarge(f"the body is larger than {MAX_BODY // 2**20} MiB"))
    return error_response(InvalidRequest(error.description or error.name), status=error.code)


def _unexpected(error: Exception) -> Response:
    record = _record()
    logger.error("request %s failed", record.id, exc_info=error)
    return error_response(internal_error(record))


def create_app(service: Service) -> QuartTrio:
    """The ASGI application. It serves from the first moment: `/health` tells whether there is a model yet."""
    app = QuartTrio(__name__, static_folder=None)
    app.request_class = _Request
    app.config.update(MAX_CONTENT_LENGTH=MAX_BODY, BODY_TIMEOUT=BODY_TIMEOUT, RESPONSE_TIMEOUT=None)
    app.url_map.merge_slashes = False
    document = msgspec.json.encode(
        openapi_document(
            title="DashInfer",
            version=service.version,
            api_keys=bool(service.config.api_keys),
            model=service.config.model_name,
        )
    )

    @app.get("/")
    async def index() -> Response:
        return Response(b"", 307, headers={"location": "docs"})

    @app.get("/health")
    async def health() -> Response:
        if (state := service.state) == "ready":
            return Response(health_body("ok", service.mode), headers=_JSON)
        return Response(health_body(state, service.mode), 503, headers=_JSON)

    @app.get("/v1/models")
    async def models() -> Response:
        engine, _ = service.require()
        assert engine.info is not None, "an engine that is ready knows its model"
        body = model_list_body(model=service.config.model_name, created=service.created, max_length=engine.info.max_length)
        return Response(body, headers=_JSON)

    @app.post(CHAT_PATH)
    async def chat_completions() -> Response:
        service.require()  # before the body is read: it may be large
        record = _record()
        completion = await chat.start(service, await request.get_data(cache=False), record.stack)
        record.describe = lambda: completion.summary
        if completion.request.stream:
            response = Response(completion.events(), headers=_EVENTS)
            response.timeout = None
            record.keep_alive = KEEP_ALIVE
            return response
        return Response(await completion.body(), headers=_JSON)

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return Response(document, headers=_JSON)

    @app.get("/docs")
    async def documentation() -> Response:
        return Response(docs.PAGE, headers=docs.PAGE_HEADERS)

    @app.get("/docs/<name>")
    async def documentation_file(name: str) -> Response:
        if (file := docs.FILES.get(name)) is None:
            return error_response(NotFound(f"there is no {name[:200]!r} here"))
        content = await trio.Path(file.path).read_bytes()
        return Response(content, headers={"content-type": file.content_type, **docs.FILE_HEADERS})

    app.register_error_handler(RequestError, error_response)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected)
    app.asgi_app = Edge(app.asgi_app, service, KeyRing(service.config.api_keys, open_paths=OPEN_PATHS))
    return app
