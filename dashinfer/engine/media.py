"""Which images and videos the ranks hold embeddings of, and who needs them.

Pure bookkeeping, like the scheduler's: the ranks encode and forget what `take_messages` says, in its order. A medium is
*pinned* by sequences that run and whose next chunks need it, and *wanted* by waiting ones. What is pinned stays; what is only
wanted gives way to what runs, so that no sequence that runs ever waits for one that does not. The rest stays until room is
needed, least recently used first out.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from dashinfer.engine.api import Medium
from dashinfer.types import Encode, Forget


@dataclass
class _Entry:
    size: int  # bytes
    pins: set[Hashable] = field(default_factory=set)  # by whom
    wants: set[Hashable] = field(default_factory=set)
    encoded: bool = False


class MediaCache:
    """Room for `capacity` bytes of embeddings, `token_bytes` each token. A medium larger than all of it is held alone."""

    def __init__(self, *, capacity: int, token_bytes: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.hits = 0  # times that a medium was there already when a sequence asked for it
        self.misses = 0
        self._token_bytes = token_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()  # least recently used first
        self._messages: list[Encode | Forget] = []

    @property
    def num_encoding(self) -> int:
        """Media that ranks were told to encode and have not yet."""
        return sum(not entry.encoded for entry in self._entries.values())

    @property
    def num_pinned(self) -> int:
        return sum(bool(entry.pins) for entry in self._entries.values())

    def hold(self, holder: Hashable, medium: Medium, *, pin: bool) -> bool:
        """Pin a medium, or want it, and have it encoded if it is not there. False: there is no room for it now.

        Doing so again changes nothing, but brings back a want that had to give way; a want becomes a pin.
        """
        entry = self._entries.get(medium.key)
        if entry is None:
            size = medium.tokens * self._token_bytes
            if not self._make_room(size, pin=pin):
                return False
            self.misses += 1
            entry = self._entries[medium.key] = _Entry(size)
            self.used += size
            self._messages.append(Encode(medium.key, medium.grid, medium.patches))
        elif holder not in entry.pins | entry.wants:
            self.hits += 1
        self._entries.move_to_end(medium.key)
        if pin:
            entry.wants.discard(holder)
            entry.pins.add(holder)
        else:
            entry.wants.add(holder)
        return True

    def release(self, holder: Hashable, key: bytes) -> None:
        """Give up a pin or a want."""
        if (entry := self._entries.get(key)) is not None:
            entry.pins.discard(holder)
            entry.wants.discard(holder)

    def abandon(self, holder: Hashable, key: bytes) -> None:
        """Give up a pin or a want for good. What is not encoded yet and nobody else asks for never is."""
        self.release(holder, key)
        entry = self._entries.get(key)
        if entry is not None and not (entry.encoded or entry.pins or entry.wants):
            del self._entries[key]
            self.used -= entry.size
            self._messages.append(Forget([key]))

    def encoded(self, keys: list[bytes]) -> None:
        """The ranks have these. One that was forgotten meanwhile, and asked for again, is there a little later than this says,
        which plans wait for."""
        for key in keys:
            if (entry := self._entries.get(key)) is not None:
                entry.encoded = True

    def failed(self, keys: list[bytes]) -> set[Hashable]:
        """The ranks have given these up. Who pins or wants them, in vain. If one was asked for again meanwhile, that is taken
        back, too."""
        holders: set[Hashable] = set()
        for key in keys:
            if (entry := self._entries.pop(key, None)) is not None:
                self.used -= entry.size
                self._messages.append(Forget([key]))
                holders |= entry.pins | entry.wants
        return holders

    def ready(self, key: bytes) -> bool:
        entry = self._entries.get(key)
        return entry is not None and entry.encoded

    def encoding(self) -> set[bytes]:
        """Keys of the media that ranks were told to encode and have not yet."""
        return {key for key, entry in self._entries.items() if not entry.encoded}

    def reset(self) -> None:
        """The ranks have lost everything, and nothing is asked of them."""
        self._entries.clear()
        self._messages.clear()
        self.used = 0

    def take_messages(self) -> list[Encode | Forget]:
        """What to tell the ranks after the plans made so far."""
        messages, self._messages = self._messages, []
        return messages

    def _make_room(self, size: int, *, pin: bool) -> bool:
        held = [entry.size for entry in self._entries.values() if entry.pins or (entry.wants and not pin)]
        if sum(held) + size > self.capacity and held:
            return False
        gone = []
        for key, entry in list(self._entries.items()):
            if self.used + size <= self.capacity:
                break
            if entry.pins or (entry.wants and not pin):
                continue
            del self._entries[key]
            self.used -= entry.size
            gone.append(key)
        if gone:
            self._messages.append(Forget(gone))
        return True
