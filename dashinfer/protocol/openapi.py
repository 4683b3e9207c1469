"""`openapi_document`: the OpenAPI 3.1 description of the routes, made from the pydantic models.

Owns the words about the routes. Knows nothing of how the document is served or shown.
"""

from typing import Any

from pydantic.json_schema import models_json_schema

from dashinfer.protocol.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ErrorResponse,
    Health,
    ModelList,
)

_EXAMPLE = {
    "messages": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
    "temperature": 0.7,
    "max_tokens": 256,
}

_ERRORS = {
    400: "A field is malformed, out of range or not supported, an image cannot be had, or the prompt leaves no room.",
    401: "The API key is missing or wrong.",
    404: "No such model.",
    413: "The body is too large.",
    429: "The queue is full; `Retry-After` says when to try again.",
    500: "The server failed.",
    503: "The model is loading, or the server is shutting down.",
}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(name: str, **more: Any) -> dict[str, Any]:
    return {"application/json": {"schema": _reference(name), **more}}


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": _ERRORS[status], "content": _json("ErrorResponse")} for status in statuses}


def openapi_document(*, title: str, version: str, api_keys: bool, model: str) -> dict[str, Any]:
    """The document as JSON types.

    Args:
        title, version: of the server.
        api_keys: routes under /v1 want a bearer token.
        model: name of the model that is served, for the examples.
    """
    requests, responses = [ChatCompletionRequest], [ChatCompletion, ChatCompletionChunk, ModelList, Health, ErrorResponse]
    _, definitions = models_json_schema(
        [*((kind, "validation") for kind in requests), *((kind, "serialization") for kind in responses)],
        ref_template="#/components/schemas/{model}",
    )
    unauthorised = (401,) if api_keys else ()
    chat = {
        "operationId": "createChatCompletion",
        "summary": "Chat completion, whole or streamed",
        "tags": ["chat"],
        "requestBody": {
            "required": True,
            "content": _json("ChatCompletionRequest", example={"model": model, **_EXAMPLE}),
        },
        "responses": {
            "200": {
                "description": "The completion; with `stream` an event for each `ChatCompletionChunk`, then `[DONE]`.",
                "content": {**_json("ChatCompletion"), "text/event-stream": {"schema": _reference("ChatCompletionChunk")}},
            },
            **_errors(400, *unauthorised, 404, 413, 429, 500, 503),
        },
    }
    models = {
        "operationId": "listModels",
        "summary": "The model that is served",
        "tags": ["models"],
        "responses": {
            "200": {"description": "A list of one.", "content": _json("ModelList")},
            **_errors(*unauthorised, 503),
        },
    }
    health = {
        "operationId": "health",
        "summary": "Whether requests are answered",
        "tags": ["health"],
        "responses": {
            "200": {"description": "Ready.", "content": _json("Health", example={"status": "ok", "mode": "llm"})},
            "503": {"description": "Loading, recovering (requests wait), draining or failed.", "content": _json("Health")},
        },
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version, "description": "OpenAI-compatible chat completions."},
        "paths": {"/v1/chat/completions": {"post": chat}, "/v1/models": {"get": models}, "/health": {"get": health}},
        "components": {"schemas": definitions["$defs"]},
    }
    if api_keys:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        for operation in (chat, models):
            operation["security"] = [{"bearer": []}]
    return document
