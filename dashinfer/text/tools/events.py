"""What an output turns out to be, piece by piece: `Event`s. Knows nothing of how they are found or sent."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a function. `index` counts the calls of an output from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of a call's arguments: the pieces of a call together are the JSON text of an object."""

    index: int
    text: str


Event = Content | Reasoning | CallBegin | Arguments


def merged(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind as one, and without empty ones."""
    found: list[Event] = []
    for event in events:
        if isinstance(event, CallBegin):
            found.append(event)
        elif event.text:
            last = found[-1] if found else None
            if type(event) is not type(last):
                found.append(event)
            elif isinstance(event, Arguments):
                assert isinstance(last, Arguments)
                if event.index == last.index:
                    found[-1] = Arguments(event.index, last.text + event.text)
                else:
                    found.append(event)
            else:
                assert isinstance(last, Content | Reasoning)
                found[-1] = type(event)(last.text + event.text)
    return found
