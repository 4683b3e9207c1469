"""The fields of a request that offer functions to the model, for every endpoint that chats.

Owns which of them may and must be called. Knows nothing of how a model writes calls.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from dashinfer.protocol.base import RequestModel

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


def _name(value: str) -> str:
    if _NAME.fullmatch(value) is None:
        raise PydanticCustomError("function_name", "must be 1 to 128 letters, digits, underscores, dots and hyphens")
    return value


def _object_schema(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "object") != "object":
        raise PydanticCustomError("parameters_type", "must be a JSON Schema of `type` object")
    return value


FunctionName = Annotated[str, AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME.pattern}$"})]


class FunctionDefinition(RequestModel):
    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_object_schema)] | None = Field(
        default=None, description="JSON Schema of an object; default: no arguments"
    )
    strict: bool | None = Field(default=None, description="calls are held to the schema, also when none is required")


class Tool(RequestModel):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionChoice(RequestModel):
    name: str


class NamedChoice(RequestModel):
    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(RequestModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedChoice(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_WORDS = ("none", "auto", "required")
# The tags appear in pydantic's error locations; `parse` takes them out.
CHOICE_TAGS = frozenset({"word", "function", "allowed_tools"})


def _choice_kind(value: Any) -> str:
    if isinstance(value, dict):
        if (kind := value.get("type")) in ("function", "allowed_tools"):
            return kind
    elif value in _WORDS:
        return "word"
    raise PydanticCustomError(
        "tool_choice", 'must be "none", "auto", "required", or an object with the `type` "function" or "allowed_tools"'
    )


def _known_choice(value: Any) -> Any:
    _choice_kind(value)
    return value


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedChoice, Tag("function")]
    | Annotated[AllowedChoice, Tag("allowed_tools")],
    Discriminator(_choice_kind),
    BeforeValidator(_known_choice),
]


class CallingRequest(RequestModel):
    """A request whose answer may be calls."""

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_TOOLS, description="functions that the model may call"
    )
    tool_choice: ToolChoice | None = Field(default=None, description="default: auto")
    parallel_tool_calls: bool | None = Field(default=None, description="more than one call in an answer; default: true")

    @model_validator(mode="after")
    def _choice_fits_tools(self) -> "CallingRequest":
        names = [tool.function.name for tool in self.tools or ()]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise PydanticCustomError("at:tools", "has two functions with the name {name}", {"name": name})
        choice = self.tool_choice
        if choice in (None, "none", "auto"):
            return self
        if not names:
            raise PydanticCustomError("at:tool_choice", "needs `tools`")
        for name in self._chosen_names() or ():
            if name not in names:
                raise PydanticCustomError("at:tool_choice", "has {name}, which is none of `tools`", {"name": repr(name)[:80]})
        return self

    def _chosen_names(self) -> list[str] | None:
        """The functions that `tool_choice` names; None where it leaves them open."""
        if isinstance(self.tool_choice, NamedChoice):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    def functions(self) -> list[FunctionDefinition]:
        """Those that may be called."""
        if self.tool_choice == "none":
            return []
        chosen = self._chosen_names()
        return [tool.function for tool in self.tools or () if chosen is None or tool.function.name in chosen]

    @property
    def call_required(self) -> bool:
        if isinstance(self.tool_choice, AllowedChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)

    @property
    def max_calls(self) -> int | None:
        """None: any number."""
        return 1 if self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedChoice) else None

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Plain dictionaries for `ChatTemplate.render`; None where nothing may be called."""
        shown = []
        for function in self.functions():
            plain: dict[str, Any] = {"name": function.name}
            if function.description is not None:
                plain["description"] = function.description
            plain["parameters"] = {"type": "object", "properties": {}} if function.parameters is None else function.parameters
            shown.append({"type": "function", "function": plain})
        return shown or None
