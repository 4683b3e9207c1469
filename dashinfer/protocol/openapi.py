"""`openapi_document`: the OpenAPI 3.1 description of the routes, made from the pydantic models."""

from typing import Any


def openapi_document(*, title: str, version: str, api_keys: bool) -> dict[str, Any]:
    raise NotImplementedError
