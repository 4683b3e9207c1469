"""`ToolFormat`: which way of writing calls a model has, found from its chat template and its vocabulary."""

import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from dashinfer.config import ToolParserName
from dashinfer.text.tools import hermes, llama, mistral, pythonic
from dashinfer.text.tools.hermes import HermesParser
from dashinfer.text.tools.llama import LlamaParser
from dashinfer.text.tools.mistral import MistralParser
from dashinfer.text.tools.parser import ToolParser
from dashinfer.text.tools.pythonic import PythonicParser
from dashinfer.text.tools.qwen_xml import QwenXmlParser

TOOL_PARSERS: dict[str, type[ToolParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
    "pythonic": PythonicParser,
    "qwen3_coder": QwenXmlParser,
}
_MARKERS = {
    "hermes": (hermes.OPEN, hermes.CLOSE),
    "llama3_json": (llama.TAG,),
    "mistral": (mistral.MARK, mistral.CALL_ID, mistral.ARGS),
    "pythonic": (pythonic.START, pythonic.END),
    "qwen3_coder": (hermes.OPEN, hermes.CLOSE),
}
_ALPHANUMERIC = string.ascii_letters + string.digits
_PYTHONIC = re.compile(r"\[\s*\w+\(\w+\s*=")  # as a template explains it: [func_name1(params_name1=params_value1


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Attributes:
    name: of the parser.
    style: which of a format's ways a model writes, of those that the parser reads. For mistral: `array`, `bare` (a name and
        arguments), `args` (with `[ARGS]` between them), `call_id` (with `[CALL_ID]` too).
    """

    name: str
    style: str = ""

    @property
    def parser(self) -> type[ToolParser]:
        return TOOL_PARSERS[self.name]

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser needs to see, special tokens or not."""
        return _MARKERS[self.name]

    def new_id(self) -> str:
        """Of a call. Mistral's templates want nine letters and digits."""
        size, prefix = (9, "") if self.name == "mistral" else (24, "call_")
        return prefix + "".join(secrets.choice(_ALPHANUMERIC) for _ in range(size))


def tool_format(name: ToolParserName, template: str | None, token_id: Callable[[str], int | None]) -> ToolFormat | None:
    """The format of a name; for `auto` the model's, None where it is not known.

    Args:
        template: the chat template's source.
        token_id: of a text that is a single token, `Tokenizer.marker_id`.
    """
    template = template or ""
    if name == "auto":
        name = _detected(template, token_id)
    if name == "none":
        return None
    return ToolFormat(name, _mistral_style(template) if name == "mistral" else "")


def _detected(template: str, token_id: Callable[[str], int | None]) -> ToolParserName:
    if "tools" not in template:
        return "none"
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "<tool_call>" in template:
        return "hermes"
    if mistral.MARK in template or token_id(mistral.MARK) is not None:
        return "mistral"
    if _PYTHONIC.search(template) or token_id(pythonic.START) is not None:
        return "pythonic"
    if '"parameters"' in template or token_id(llama.TAG) is not None:
        return "llama3_json"
    return "none"


def _mistral_style(template: str) -> str:
    if mistral.CALL_ID in template:
        return "call_id"
    if mistral.ARGS in template:
        return "args"
    return "array"
