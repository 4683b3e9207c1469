"""`RequestModel`: what every pydantic model of a request shares."""

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class RequestModel(BaseModel):
    """Base of what clients send: JSON types exactly, and no field we don't know."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, value: Any) -> Any:
        """One error for the first unknown field: pydantic would make one for each of a million."""
        if isinstance(value, dict):
            known = {field.alias or name for name, field in cls.model_fields.items()}
            for name in value:
                if name not in known:
                    raise PydanticCustomError("unknown_field", "is not a field this server knows", {"field": name})
        return value
