"""Random JSON Schemas of what requests ask for: objects of objects, arrays, strings with patterns and formats, numbers with
bounds, choices, references."""

import random
from typing import Any

FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration"]
PATTERNS = ["^[a-z]{2,5}$", "[0-9]+", "^(a|bc)*$", "^\\d{3}-\\d{4}$", '^[^"\\\\]*$', "é+", "^$"]
NAMES = ["a", "b", "name", "x y", "ключ", 'q"', "", "🙂", "long_name_of_a_property"]
SIMPLE = [None, True, False, 0, -1, 1.5, "", "text", 'q"\\', "é🙂\n"]
VALUES = [*SIMPLE, [], [1, "a"], {}, {"a": [None]}]


class Schemas:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self) -> Any:
        """One with definitions, in about every third a recursive one."""
        root = self._object(3)
        if self._maybe(0.35):
            root["$defs"] = {"node": self._node(), "leaf": self._any(0)}
            root.setdefault("properties", {})["tree"] = {"$ref": "#/$defs/node"}
            root["properties"]["leaf"] = {"$ref": "#/$defs/leaf"}
        return root if self._maybe(0.8) else self._any(3)

    def _maybe(self, chance: float = 0.5) -> bool:
        return self._random.random() < chance

    def _any(self, depth: int) -> Any:
        kinds = [self._string, self._string, self._integer, self._number, self._enum, self._const, self._simple]
        if depth > 0:
            kinds += [lambda: self._object(depth), lambda: self._array(depth), lambda: self._choice(depth)]
        return self._random.choice(kinds)()

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randint(0, 4))
        found: dict[str, Any] = {"type": "object", "properties": {name: self._any(depth - 1) for name in names}}
        if self._maybe():
            found["required"] = [name for name in names if self._maybe(0.7)]
        if self._maybe(0.6):
            found["additionalProperties"] = False if self._maybe(0.7) else self._any(0)
        if self._maybe(0.1):
            found["patternProperties"] = {"^p_": self._any(0)}
        return found

    def _array(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "array", "items": self._any(depth - 1)}
        if self._maybe(0.3):
            found["prefixItems"] = [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]
        return self._bounds(found, "minItems", "maxItems", 0, 4)

    def _string(self) -> dict[str, Any]:
        match self._random.randrange(4):
            case 0:
                return {"type": "string", "pattern": self._random.choice(PATTERNS)}
            case 1:
                return {"type": "string", "format": self._random.choice(FORMATS)}
            case 2:
                return self._bounds({"type": "string"}, "minLength", "maxLength", 0, 12)
        return {"type": "string"}

    def _integer(self) -> dict[str, Any]:
        found = self._bounds({"type": "integer"}, "minimum", "maximum", -1000, 1000)
        return found | {"multipleOf": self._random.choice([2, 5, 10])} if self._maybe(0.1) else found

    def _number(self) -> dict[str, Any]:
        names = ("minimum", "maximum") if self._maybe() else ("exclusiveMinimum", "exclusiveMaximum")
        return self._bounds({"type": "number"}, *names, -10, 10)

    def _bounds(self, schema: dict[str, Any], low: str, high: str, least: int, most: int) -> dict[str, Any]:
        first, second = sorted(self._random.sample(range(least, most + 1), 2))
        if self._maybe(0.4):
            schema[low] = first
        if self._maybe(0.4):
            schema[high] = second
        return schema

    def _enum(self) -> dict[str, Any]:
        return {"enum": self._random.sample(VALUES, self._random.randint(1, 5))}

    def _const(self) -> dict[str, Any]:
        return {"const": self._random.choice(VALUES)}

    def _simple(self) -> Any:
        return self._random.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {"type": "number"}])

    def _choice(self, depth: int) -> dict[str, Any]:
        kind = self._random.choice(["anyOf", "anyOf", "oneOf", "allOf"])
        if kind == "allOf":
            return {"allOf": [self._object(1), {"type": "object", "required": ["a"]}]}
        if kind == "oneOf":  # told apart by a constant
            return {
                "oneOf": [{"type": "object", "properties": {"kind": {"const": name}}, "required": ["kind"]} for name in "ab"]
            }
        return {"anyOf": [self._any(depth - 1) for _ in range(self._random.randint(1, 3))]}

    def _node(self) -> dict[str, Any]:
        children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
        return {
            "type": "object",
            "properties": {"value": self._any(0), "children": children},
            "required": ["value"],
            "additionalProperties": False,
        }
