"""Qwen3-Coder's calls: `<tool_call><function=f><parameter=a>value</parameter></function></tool_call>`. Parameters are passed
on one at a time. What is text and what is JSON among the values is told by the types in the function's schema."""

import json
from collections.abc import Mapping
from typing import Any

from dashinfer.text.tools.parser import Reading, ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_LITERALS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class QwenXmlParser(ToolParser):
    def _parse(self) -> Reading[None]:
        while marker := (yield from self._content(OPEN, FUNCTION)):
            self._keep()
            if marker == OPEN:
                self._at += len(OPEN)
                yield from self._blank()
            name = ""
            if (yield from self._literal(FUNCTION)):
                name = yield from self._word()
            if not name or not (yield from self._literal(">")):
                self._give_back(len(marker))
                continue
            self._begin(name)
            if (yield from self._parameters(self._tools.get(name, {}))):
                self._end()
                yield from self._blank()
                yield from self._literal(CLOSE)

    def _parameters(self, schema: Mapping[str, Any]) -> Reading[bool]:
        """Up to the function's end; False where they break off, which is given back."""
        properties = schema.get("properties")
        self._argue("{")
        count = 0
        while True:
            self._keep()
            yield from self._blank()
            if (yield from self._literal(END_FUNCTION)):
                self._mark = None
                self._argue("}")
                return True
            if not (yield from self._literal(PARAMETER)):
                break
            name = yield from self._word()
            if not name or not (yield from self._literal(">")):
                break
            value = yield from self._until(END_PARAMETER)
            if value is None:
                break
            kind = properties.get(name) if isinstance(properties, Mapping) else None
            shown = f"{json.dumps(name, ensure_ascii=False)}: {_json_value(value, kind)}"
            self._argue(f"{', ' if count else ''}{shown}")
            count += 1
        self._give_back()
        return False


def types_of(schema: Any) -> set[str] | None:
    """The JSON types that a schema names; None where it names none."""
    if not isinstance(schema, Mapping):
        return None
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {name for name in kind if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = [types_of(choice) for choice in schema[key]]
            return None if None in found else set().union(*(names for names in found if names is not None))
    if isinstance(values := schema.get("enum"), list) and all(isinstance(value, str) for value in values):
        return {"string"}
    return None


def _json_value(text: str, schema: Any) -> str:
    """JSON of a parameter's text, which stands on lines of its own."""
    text = text.removeprefix("\n").removesuffix("\n")
    types = types_of(schema)
    word = text.strip()
    if types is None or types - {"string"}:
        literal = _LITERALS.get(word.lower())
        if literal is not None and (types is None or {"null": "null"}.get(literal, "boolean") in types):
            return literal
    if types is None or "string" not in types:
        try:
            value = json.dumps(json.loads(word), ensure_ascii=False, allow_nan=False)
            value.encode()
            return value
        except (ValueError, RecursionError):
            pass
    return json.dumps(text, ensure_ascii=False)
