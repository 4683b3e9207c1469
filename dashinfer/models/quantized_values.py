"""Values of a `quantization_config` that several libraries write, checked. Knows no torch."""

import re
from typing import Any

from dashinfer.errors import UnsupportedModel


def read_group_size(value: Any) -> int | None:
    """A positive multiple of 8; None for -1, which is a whole row."""
    if value in (-1, None):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 8:
        raise UnsupportedModel(f"config.json: group_size of quantization_config is {value!r}, no multiple of 8 and not -1")
    return value


def read_names(value: Any, key: str) -> tuple[str, ...]:
    """The names of modules under `key`, whose patterns are such."""
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise UnsupportedModel(f"config.json: {key} of quantization_config is {value!r}, not a list of names")
    for name in value:
        if name.startswith("re:"):
            read_pattern(name[3:])
    return tuple(value)


def read_pattern(text: str) -> re.Pattern[str]:
    """Raises UnsupportedModel for a text that is no pattern."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UnsupportedModel(f"config.json: quantization_config has the pattern {text!r}, which is none: {error}") from None


def unsupported(what: str, known: str) -> UnsupportedModel:
    """What to say of a setting."""
    return UnsupportedModel(f"{what} are not supported; supported: {known}")
