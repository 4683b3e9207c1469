import json
from collections.abc import Iterator
from typing import Any

import pytest

from dashinfer.protocol.anthropic import CountTokensRequest, MessagesRequest
from dashinfer.protocol.base import RequestModel
from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.protocol.completions import CompletionRequest
from dashinfer.protocol.embeddings import EmbeddingRequest
from dashinfer.protocol.openapi import openapi_document
from dashinfer.protocol.parse import parse_request
from dashinfer.protocol.responses import ResponsesRequest
from dashinfer.protocol.tokens import DetokenizeRequest, TokenizeRequest

pytestmark = pytest.mark.feature("Endpoints", "API as a document")


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            elif key == "mapping":
                yield from inner.values()
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


@pytest.fixture(params=[True, False])
def document(request: pytest.FixtureRequest) -> dict[str, Any]:
    return openapi_document(title="DashInfer", version="3.0", api_keys=request.param, model="demo")


def test_it_is_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document)) == document
    assert document["openapi"] == "3.1.0"
    assert document["info"]["title"] == "DashInfer"


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    schemas = document["components"]["schemas"]

    assert {f"#/components/schemas/{name}" for name in schemas} == found
    assert "$defs" not in json.dumps(document)


def test_routes(document: dict[str, Any]) -> None:
    routes = {(path, method) for path, methods in document["paths"].items() for method in methods}
    chat = document["paths"]["/v1/chat/completions"]["post"]

    assert {("/v1/chat/completions", "post"), ("/v1/models", "get"), ("/health", "get")} < routes
    assert chat["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert {"400", "404", "413", "429", "503"} < chat["responses"].keys()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/v1/completions", CompletionRequest),
        ("/v1/embeddings", EmbeddingRequest),
        ("/v1/responses", ResponsesRequest),
        ("/v1/messages", MessagesRequest),
        ("/v1/messages/count_tokens", CountTokensRequest),
        ("/tokenize", TokenizeRequest),
        ("/detokenize", DetokenizeRequest),
    ],
)
def test_the_example_is_a_request(document: dict[str, Any], path: str, kind: type[RequestModel]) -> None:
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]

    assert parse_request(kind, json.dumps(body["example"]).encode()).model == "demo"


def test_keys() -> None:
    closed = openapi_document(title="t", version="1", api_keys=True, model="demo")
    open_ = openapi_document(title="t", version="1", api_keys=False, model="demo")

    assert closed["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert closed["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}]
    assert "security" not in closed["paths"]["/health"]["get"]
    assert "security" not in json.dumps(open_)
    assert "401" not in open_["paths"]["/v1/models"]["get"]["responses"]


def test_every_field_is_described(document: dict[str, Any]) -> None:
    properties = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]

    assert properties.keys() == ChatCompletionRequest.model_fields.keys()
    assert properties["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}


@pytest.mark.parametrize("name", ["ChatCompletionRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest"])
def test_a_field_that_may_be_left_out_may_be_null(document: dict[str, Any], name: str) -> None:
    schema = document["components"]["schemas"][name]
    words = {"title", "description", "default"}
    fields = {field: said for field, said in schema["properties"].items() if said.keys() - words}

    assert {field for field, said in fields.items() if {"type": "null"} not in said.get("anyOf", ())} == set(schema["required"])


def test_events_are_described_by_their_fields(document: dict[str, Any]) -> None:
    def data(path: str) -> dict[str, Any]:
        return document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]["properties"][
            "data"
        ]

    assert data("/v1/messages")["contentSchema"] == {"$ref": "#/components/schemas/MessagesEvent"}
    assert data("/v1/chat/completions")["anyOf"][0] == {"const": "[DONE]"}


def test_tokenize_takes_one_of_two(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["TokenizeRequest"]

    assert [one["required"] for one in schema["oneOf"]] == [["prompt"], ["messages"]]
    given = [one["properties"] for one in schema["oneOf"]]
    assert given == [{"prompt": {"type": "string"}}, {"messages": {"type": "array"}}]  # a null is none of both
