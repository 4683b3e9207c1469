"""`openapi_document`: the OpenAPI 3.1 description of the routes, made from the pydantic models.

Owns the words about the routes. Knows nothing of how the document is served or shown.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from dashinfer.protocol.anthropic import (
    AnthropicError,
    CountTokensRequest,
    MessagesEvent,
    MessagesRequest,
    MessagesResponse,
    TokenCount,
)
from dashinfer.protocol.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ErrorResponse,
    Health,
    Model,
    ModelList,
)
from dashinfer.protocol.completions import Completion, CompletionRequest
from dashinfer.protocol.embeddings import EmbeddingList, EmbeddingRequest
from dashinfer.protocol.response_encoder import ResponseEvent, ResponseObject
from dashinfer.protocol.responses import DeletedResponse, ItemList, Page, ResponsesRequest, StreamQuery
from dashinfer.protocol.status import Version
from dashinfer.protocol.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse, TokenizerInfo

_ERRORS = {
    400: "A field is malformed, out of range or not supported, an image cannot be had, or the prompt leaves no room.",
    401: "The API key is missing or wrong.",
    404: "No such model, or no such response.",
    413: "The body is too large.",
    429: "The queue is full, or the key has used what it may; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The model is loading, or the server is shutting down.",
}
_WORK = (400, 404, 413, 429, 500, 503)  # what a request with a body may be refused with


@dataclass(frozen=True)
class _Route:
    """One operation. `request` and the models of `responses` are described by their schemas.

    Attributes:
        responses: status to what it means and its model, or the media type of what is no JSON.
        events: the model of the data of a streamed answer's events.
        closed: a streamed answer ends with `[DONE]`, or with an ErrorResponse among its events.
        errors: statuses that come with an ErrorResponse, 401 aside.
        parameters: of the path, name to description.
        query: the parameters of the query string.
        open: wants no key where others do.
    """

    method: str
    path: str
    id: str
    summary: str
    tag: str
    responses: dict[int, tuple[str, type[BaseModel] | str]]
    request: type[BaseModel] | None = None
    example: dict[str, Any] | None = None
    events: type[BaseModel] | None = None
    closed: bool = False
    errors: tuple[int, ...] = ()
    parameters: dict[str, str] = field(default_factory=dict)
    query: type[BaseModel] | None = None
    open: bool = False
    error: type[BaseModel] = ErrorResponse


def _health(path: str, id: str, summary: str, *, method: str = "get", ok: str = "Ready.", otherwise: str = "") -> _Route:
    otherwise = otherwise or "Loading, recovering (requests wait), draining or failed."
    responses: dict[int, tuple[str, type[BaseModel] | str]] = {200: (ok, Health), 503: (otherwise, Health)}
    return _Route(method, path, id, summary, "health", responses, open=True)


_RESPONSE_ID = {"id": "of a response"}

_ROUTES = (
    _Route(
        "post",
        "/v1/chat/completions",
        "createChatCompletion",
        "Chat completion, whole or streamed",
        "chat",
        {200: ("The completion; with `stream` an event for each `ChatCompletionChunk`, then `[DONE]`.", ChatCompletion)},
        request=ChatCompletionRequest,
        example={
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "What is the capital of France?"},
            ],
            "temperature": 0.7,
            "max_tokens": 256,
        },
        events=ChatCompletionChunk,
        closed=True,
        errors=_WORK,
    ),
    _Route(
        "post",
        "/v1/completions",
        "createCompletion",
        "Completion of text, whole or streamed",
        "completions",
        {200: ("The completion; with `stream` its events are of the same shape, closed by `[DONE]`.", Completion)},
        request=CompletionRequest,
        example={"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0},
        events=Completion,
        closed=True,
        errors=_WORK,
    ),
    _Route(
        "post",
        "/v1/responses",
        "createResponse",
        "A turn of a conversation, whole or streamed",
        "responses",
        {200: ("The response; with `stream` its typed events.", ResponseObject)},
        request=ResponsesRequest,
        example={"input": "What is the capital of France?"},
        events=ResponseEvent,
        errors=_WORK,
    ),
    _Route(
        "get",
        "/v1/responses/{id}",
        "getResponse",
        "A response that is kept or runs, or its events",
        "responses",
        {200: ("The response; with `stream` the events of one that was streamed in the background.", ResponseObject)},
        events=ResponseEvent,
        errors=(400, 404),
        parameters=_RESPONSE_ID,
        query=StreamQuery,
    ),
    _Route(
        "delete",
        "/v1/responses/{id}",
        "deleteResponse",
        "Keep a response no more; one that runs ends",
        "responses",
        {200: ("It is gone.", DeletedResponse)},
        errors=(404,),
        parameters=_RESPONSE_ID,
    ),
    _Route(
        "get",
        "/v1/responses/{id}/input_items",
        "listInputItems",
        "What a response was an answer to",
        "responses",
        {200: ("A page of the items.", ItemList)},
        errors=(400, 404),
        parameters=_RESPONSE_ID,
        query=Page,
    ),
    _Route(
        "post",
        "/v1/responses/{id}/cancel",
        "cancelResponse",
        "End a response in the background",
        "responses",
        {200: ("The response as it ended.", ResponseObject)},
        errors=(400, 404),
        parameters=_RESPONSE_ID,
    ),
    _Route(
        "post",
        "/v1/messages",
        "createMessage",
        "Chat in Anthropic's shape, whole or streamed",
        "messages",
        {200: ("The message; with `stream` its events.", MessagesResponse)},
        request=MessagesRequest,
        example={"max_tokens": 256, "messages": [{"role": "user", "content": "What is the capital of France?"}]},
        events=MessagesEvent,
        errors=_WORK,
        error=AnthropicError,
    ),
    _Route(
        "post",
        "/v1/messages/count_tokens",
        "countTokens",
        "Tokens of a prompt in Anthropic's shape",
        "messages",
        {200: ("How many there are.", TokenCount)},
        request=CountTokensRequest,
        example={"messages": [{"role": "user", "content": "What is the capital of France?"}]},
        errors=_WORK,
        error=AnthropicError,
    ),
    _Route(
        "post",
        "/v1/embeddings",
        "createEmbedding",
        "Vectors that stand for texts",
        "embeddings",
        {200: ("An embedding of each input.", EmbeddingList)},
        request=EmbeddingRequest,
        example={"input": ["What is the capital of France?", "Paris"]},
        errors=_WORK,
    ),
    _Route(
        "post",
        "/tokenize",
        "tokenize",
        "Tokens of a prompt or of messages",
        "tokens",
        {200: ("The tokens.", TokenizeResponse)},
        request=TokenizeRequest,
        example={"prompt": "What is the capital of France?"},
        errors=_WORK,
    ),
    _Route(
        "post",
        "/detokenize",
        "detokenize",
        "Text of tokens",
        "tokens",
        {200: ("The text.", DetokenizeResponse)},
        request=DetokenizeRequest,
        example={"tokens": [1, 2, 3]},
        errors=_WORK,
    ),
    _Route(
        "get",
        "/tokenizer_info",
        "tokenizerInfo",
        "Special tokens",
        "tokens",
        {200: ("The tokeniser's.", TokenizerInfo)},
        errors=(503,),
    ),
    _Route(
        "get",
        "/v1/models",
        "listModels",
        "The model that is served",
        "models",
        {200: ("A list of one.", ModelList)},
        errors=(503,),
    ),
    _Route(
        "get",
        "/v1/models/{model}",
        "retrieveModel",
        "The model of that name",
        "models",
        {200: ("The model.", Model)},
        errors=(404, 503),
        parameters={"model": "name of the model, with slashes or without"},
    ),
    _health("/health", "health", "Whether requests are answered"),
    _health(
        "/health/live",
        "live",
        "Whether the server is worth keeping",
        ok="Anything but failed.",
        otherwise="Failed: start it again.",
    ),
    _health("/health/ready", "ready", "Whether requests should be sent here"),
    _health("/ping", "ping", "As /health/ready"),
    _health("/ping", "pingPost", "As /health/ready", method="post"),
    _Route("get", "/metrics", "metrics", "Counts and latencies", "health", {200: ("In Prometheus' format.", "text/plain")}),
    _Route("get", "/version", "version", "The server's version", "health", {200: ("The version.", Version)}, open=True),
)


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _content(kind: type[BaseModel] | str, **more: Any) -> dict[str, Any]:
    if isinstance(kind, str):
        return {kind: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": _reference(kind), **more}}


def _event(kind: type[BaseModel], *, closed: bool) -> dict[str, Any]:
    """A schema of each event, by the fields that it has in the stream."""
    data: dict[str, Any] = {"type": "string", "contentMediaType": "application/json", "contentSchema": _reference(kind)}
    if closed:
        data["contentSchema"] = {"anyOf": [_reference(kind), _reference(ErrorResponse)]}
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}


def _operation(route: _Route, *, api_keys: bool, model: str) -> dict[str, Any]:
    closed = api_keys and not route.open
    errors = sorted({*route.errors, 401} if closed else route.errors)
    responses = {status: {"description": text, "content": _content(kind)} for status, (text, kind) in route.responses.items()}
    for status in errors:
        responses[status] = {"description": _ERRORS[status], "content": _content(route.error)}
    if route.events is not None:
        responses[200]["content"]["text/event-stream"] = {"schema": _event(route.events, closed=route.closed)}
    operation: dict[str, Any] = {
        "operationId": route.id,
        "summary": route.summary,
        "tags": [route.tag],
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    if route.request is not None:
        example = {"model": model, **(route.example or {})}
        operation["requestBody"] = {"required": True, "content": _content(route.request, example=example)}
    if route.parameters:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in route.parameters.items()
        ]
    if route.query is not None:
        fields = route.query.model_json_schema()["properties"]
        described = {name: schema.pop("description", "") for name, schema in fields.items()}
        operation["parameters"] += [
            {"name": name, "in": "query", "description": described[name], "schema": schema} for name, schema in fields.items()
        ]
    if closed:
        operation["security"] = [{"bearer": []}]
    return operation


def _nullable(schema: dict[str, Any]) -> None:
    """A null is a field that is left out, where a request itself has it."""
    words = ("title", "description", "default")
    for name, described in schema["properties"].items():
        value = {key: said for key, said in described.items() if key not in words}
        if name in schema.get("required", ()) or not value or {"type": "null"} in value.get("anyOf", ()):
            continue
        kinds = value["anyOf"] if value.keys() == {"anyOf"} else [value]
        schema["properties"][name] = {
            "anyOf": [*kinds, {"type": "null"}],
            **{key: described[key] for key in words if key in described},
        }


def openapi_document(*, title: str, version: str, api_keys: bool, model: str) -> dict[str, Any]:
    """The document as JSON types.

    Args:
        title, version: of the server.
        api_keys: routes that are not open want a bearer token.
        model: name of the model that is served, for the examples.
    """
    requests = [route.request for route in _ROUTES if route.request is not None]
    answers = [kind for route in _ROUTES for _, kind in route.responses.values() if not isinstance(kind, str)]
    answers += [route.error for route in _ROUTES]
    answers += [route.events for route in _ROUTES if route.events is not None]
    _, definitions = models_json_schema(
        [
            *((kind, "validation") for kind in dict.fromkeys(requests)),
            *((kind, "serialization") for kind in dict.fromkeys([*answers, ErrorResponse])),
        ],
        ref_template="#/components/schemas/{model}",
    )
    for kind in requests:
        _nullable(definitions["$defs"][kind.__name__])
    paths: dict[str, dict[str, Any]] = {}
    for route in _ROUTES:
        paths.setdefault(route.path, {})[route.method] = _operation(route, api_keys=api_keys, model=model)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": "OpenAI-compatible API of a language model."},
        "paths": paths,
        "components": {"schemas": definitions["$defs"]},
    }
    if api_keys:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return document
