"""What a fingerprint of messages depends on."""

from typing import Any, Literal

import pytest
from msgspec import Struct, defstruct

from dashinfer.cluster import wire
from dashinfer.cluster.messages import FromHub
from dashinfer.cluster.wire import WIRE, fingerprint
from dashinfer.types import FromParent, StepPlan


class Inner(Struct, array_like=True):
    """Of some kind."""

    numbers: tuple[int, ...]
    kind: Literal["a", "b"]
    next: "Inner | None" = None


Fields = list[tuple[str, Any] | tuple[str, Any, Any]]
FIELDS: Fields = [("inner", Inner), ("words", dict[str, bytes], {}), ("count", int, 0)]


def outer(fields: Fields = FIELDS, tag: str = "outer", **options: Any) -> type[Struct]:
    return defstruct("Outer", fields, tag=tag, **options)


@pytest.mark.parametrize(
    "changed",
    [
        outer([*FIELDS, ("more", int, 0)]),
        outer(FIELDS[:2]),
        outer([*FIELDS[:2], ("count", int, 1)]),
        outer([*FIELDS[:2], ("counted", int, 0)]),
        outer([*FIELDS[:2], ("count", int | None, 0)]),
        outer([FIELDS[0], ("words", dict[str, str], {}), FIELDS[2]]),
        outer([("inner", Inner), ("count", int, 0), ("words", dict[str, bytes], {})]),
        outer([("inner", Inner | None), *FIELDS[1:]]),
        outer(tag="other"),
        outer(array_like=True),
        outer([("inner", defstruct("Inner", [("numbers", tuple[int, ...])], array_like=True)), *FIELDS[1:]]),
    ],
)
def test_every_change_of_a_message_shows(changed: type[Struct]) -> None:
    assert fingerprint(changed) != fingerprint(outer())


def test_nothing_else_does() -> None:
    again = outer()
    again.__doc__ = "Other words."

    assert fingerprint(again) == fingerprint(outer())
    assert fingerprint(outer() | Inner) == fingerprint(Inner | outer())


def test_a_message_that_is_gone_shows() -> None:
    assert fingerprint(outer() | Inner) != fingerprint(outer())


def test_what_ranks_are_told_is_part_of_it() -> None:
    described: dict[type, str] = {}
    wire._spell(FromParent, described)
    wire._spell(FromHub, described)

    assert {"StepPlan", "Chunk", "SamplingParams", "WorkerConfig", "ModelFiles", "Refusal"} <= {
        each.__name__ for each in described
    }
    assert described[StepPlan].startswith("StepPlan 'plan' map False: step: int; enter: list[Enter]; chunks: list[Chunk]; ")
    assert len(WIRE) == 8
