"""Responses that tell about the server: `/version`, `/v1/models/{id}`. Those of `/health` and `/v1/models` are in `chat`."""

import msgspec
from pydantic import BaseModel, Field

_encode = msgspec.json.Encoder().encode


class Version(BaseModel):
    version: str = Field(description="of DashInfer")


def version_body(version: str) -> bytes:
    """JSON of a Version."""
    return _encode({"version": version})
