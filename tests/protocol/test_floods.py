"""Bodies with a mistake many times over: what pydantic notes of each is a hundred times its size."""

from typing import Any

import pytest
from pydantic import ValidationError

from dashinfer.protocol.anthropic import CountTokensRequest, MessagesRequest
from dashinfer.protocol.base import RequestModel
from dashinfer.protocol.chat import ChatCompletionRequest
from dashinfer.protocol.completions import CompletionRequest
from dashinfer.protocol.embeddings import EmbeddingRequest
from dashinfer.protocol.responses import ResponsesRequest
from dashinfer.protocol.tokens import DetokenizeRequest, TokenizeRequest

MANY = 5000
MOST = 20  # errors
KINDS = (
    *(ChatCompletionRequest, CompletionRequest, EmbeddingRequest, ResponsesRequest),
    *(MessagesRequest, CountTokensRequest, TokenizeRequest, DetokenizeRequest),
)
FLOODS: dict[str, Any] = {
    "numbers": [1.5] * MANY,
    "objects": [{}] * MANY,
    "arrays": [[]] * MANY,
    "parts": [{"role": "user", "content": [1] * MANY}],
    "members": {str(number): [] for number in range(MANY)},
}


def count(kind: type[RequestModel], fields: dict[str, Any]) -> int:
    try:
        kind.model_validate(fields)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("flood", FLOODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_in_any_field_costs_few_errors(kind: type[RequestModel], flood: str) -> None:
    names = [field.alias or name for name, field in kind.model_fields.items()]
    errors = {name: count(kind, {name: FLOODS[flood]}) for name in names}

    assert {name: number for name, number in errors.items() if number > MOST} == {}
