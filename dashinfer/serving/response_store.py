"""`ResponseStore`: responses that have ended, kept in memory for the key that asked for them, within bounds."""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from dashinfer.errors import NotFound
from dashinfer.protocol.responses import Item
from dashinfer.serving.auth import NOBODY
from dashinfer.serving.event_log import EventLog

MAX_KEPT = 4096  # responses
MAX_KEPT_BYTES = 64 * 1024 * 1024  # of all responses and their conversations, as JSON
SHARE = 4  # a key may have one in so many of both, and so much is the most that one response may take

_decode = msgspec.json.Decoder(list[Item]).decode
_decode_raw = msgspec.json.Decoder(list[msgspec.Raw]).decode


@dataclass(frozen=True)
class Kept:
    """A response and what it was made of. Items are kept as JSON: as objects they can take thirty times as much.

    Attributes:
        body: its JSON.
        given: JSON arrays of the items of this turn's input and of the turns before it, their outputs too.
        output: a JSON array of what the model answered.
        background: it was asked for in the background.
        events: of one that was streamed from there.
        without: what took too much to be kept, in whose place there is nothing.
    """

    body: bytes
    given: tuple[bytes, ...]
    output: bytes
    background: bool = False
    events: EventLog | None = None
    without: frozenset[Literal["events", "conversation"]] = frozenset()

    @property
    def size(self) -> int:
        events = self.events.size if self.events is not None else 0
        return len(self.body) + sum(map(len, self.given)) + len(self.output) + events

    @property
    def conversation(self) -> tuple[bytes, ...]:
        return (*self.given, self.output)

    def fitted(self, most: int) -> "Kept | None":
        """As much of it as takes up to `most` bytes: events go first, then the conversation; None where the body takes more."""
        kept = self
        if kept.size > most and kept.events is not None:
            kept = replace(kept, events=None, without=kept.without | {"events"})
        if kept.size > most:
            kept = replace(kept, given=(), output=b"[]", without=kept.without | {"conversation"})
        return None if kept.size > most else kept


def items_of(turns: Iterable[bytes]) -> list[Item]:
    """The items of turns, as `Kept.conversation` has them."""
    return [item for turn in turns for item in _decode(turn)]


def raw_items_of(turns: Iterable[bytes]) -> list[msgspec.Raw]:
    """The same, each still JSON."""
    return [item for turn in turns for item in _decode_raw(turn)]


@dataclass
class _Shelf:
    """One key's, the least recently used first."""

    kept: OrderedDict[str, Kept] = field(default_factory=OrderedDict)
    size: int = 0

    def take(self, id: str) -> None:
        self.size -= self.kept.pop(id).size

    def take_oldest(self) -> None:
        _, gone = self.kept.popitem(last=False)
        self.size -= gone.size


class ResponseStore:
    """Responses by the key that asked for them, and their id. For any thread.

    Where there is no more room, a key's least recently used go first, and of all keys the one that has most gives: nobody loses
    anything to a key that has more. Requests without keys are all one key, which may have all the room.
    """

    def __init__(self, *, most: int = MAX_KEPT, most_bytes: int = MAX_KEPT_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._shelves: dict[bytes, _Shelf] = {}
        self._owners: set[bytes] | None = None  # of the last `keep`
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """What all take."""
        return sum(shelf.size for shelf in self._shelves.values())

    def put(self, owner: bytes, id: str, kept: Kept) -> None:
        """Keep as much of one as `Kept.fitted` says; nothing where that is nothing, and nothing of a forgotten key."""
        if (fitted := kept.fitted(self._most_bytes // SHARE)) is None:
            return
        share = 1 if owner == NOBODY else SHARE
        with self._lock:
            if self._owners is not None and owner not in self._owners:
                return
            own = self._shelves.setdefault(owner, _Shelf())
            own.kept[id] = fitted
            own.size += fitted.size
            while own.size > self._most_bytes // share or len(own.kept) > self._most // share:
                own.take_oldest()
            while self.size > self._most_bytes:
                max(self._shelves.values(), key=lambda shelf: shelf.size).take_oldest()
            while sum(len(shelf.kept) for shelf in self._shelves.values()) > self._most:
                max(self._shelves.values(), key=lambda shelf: len(shelf.kept)).take_oldest()

    def get(self, owner: bytes, id: str, *, param: str | None = None) -> Kept:
        """Raises NotFound."""
        with self._lock:
            shelf = self._shelves.get(owner)
            if shelf is None or (found := shelf.kept.get(id)) is None:
                raise NotFound(f"there is no response {id[:100]!r}, or it is kept no more", param=param)
            shelf.kept.move_to_end(id)
        return found

    def keep(self, owners: set[bytes]) -> None:
        """Forget the responses of other keys, those that are still to come too."""
        with self._lock:
            self._owners = owners
            self._shelves = {owner: shelf for owner, shelf in self._shelves.items() if owner in owners}

    def delete(self, owner: bytes, id: str) -> None:
        """Raises NotFound."""
        self.get(owner, id)
        with self._lock:
            if id in self._shelves[owner].kept:
                self._shelves[owner].take(id)
