"""`RequestModel`: what every pydantic model of a request shares."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
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


def _text_or_objects(value: Any) -> Any:
    """One error for all items, as above."""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        return value
    raise PydanticCustomError("text_or_objects", "must be a string or an array of objects")


TextOrObjects = Annotated[str | list[dict[str, Any]], BeforeValidator(_text_or_objects)]
