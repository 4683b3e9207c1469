"""A fingerprint of the messages that machines exchange, so that builds which would misread each other part when they meet."""

import hashlib
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from dashinfer.cluster.messages import FromAgent, FromHub
from dashinfer.types import FromParent, FromWorker


def fingerprint(*types: Any) -> bytes:
    """8 bytes that depend on names, order, types and defaults of the fields of all message types that these lead to, on their
    tags, and on nothing else: neither on docstrings nor on the versions of Python and msgspec."""
    known: dict[type, str] = {}
    spelled = [_spell(each, known) for each in types]
    described = "\n".join([*spelled, *sorted(known.values())])
    return hashlib.sha256(described.encode()).digest()[:8]


def _spell(kind: Any, known: dict[type, str]) -> str:
    """A type in one line; what is said of the Structs in it comes into `known`."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        _describe(kind, known)
        return kind.__name__
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"Literal{sorted(map(repr, arguments))}"
    if origin in (Union, UnionType):
        return " | ".join(sorted(_spell(each, known) for each in arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join('...' if each is ... else _spell(each, known) for each in arguments)}]"
    return getattr(kind, "__name__", str(kind))


def _describe(struct: type[msgspec.Struct], known: dict[type, str]) -> None:
    if struct in known:
        return
    known[struct] = ""  # it may lead to itself
    config, hints = struct.__struct_config__, get_type_hints(struct)
    fields = []
    for field in msgspec.structs.fields(struct):
        default = "" if field.default is msgspec.NODEFAULT else f" = {field.default!r}"
        if field.default_factory is not msgspec.NODEFAULT:
            default = f" = {field.default_factory.__name__}()"
        fields.append(f"{field.encode_name}: {_spell(hints[field.name], known)}{default}")
    shape = "array" if config.array_like else "map"
    known[struct] = f"{struct.__name__} {config.tag!r} {shape} {config.omit_defaults}: {'; '.join(fields)}"


WIRE = fingerprint(FromHub, FromAgent, FromParent, FromWorker)
