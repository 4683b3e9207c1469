"""`EventLog`: the server-sent events of one answer, to be read from any one on, while they come and afterwards."""

import zlib
from bisect import bisect_right
from collections.abc import AsyncIterator

import trio

_BLOCK = 256  # events; an event a token is as like the one before as can be, so a block takes a tenth of its size
_END = b"\n\n"


class EventLog:
    """Attributes:
    count: events so far, which are numbered from 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self._firsts: list[int] = []  # the number of each block's first event
        self._blocks: list[bytes] = []  # compressed
        self._recent: list[bytes] = []  # events that are in no block yet
        self._ended = False
        self._changed = trio.Event()

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(map(len, self._blocks)) + sum(map(len, self._recent))

    def append(self, events: bytes) -> None:
        """One or more whole events."""
        pieces = events.split(_END)[:-1]
        self._recent += pieces
        self.count += len(pieces)
        if len(self._recent) >= _BLOCK:
            self._pack()
        self._tell()

    def end(self) -> None:
        """There are no more."""
        self._pack()
        self._ended = True
        self._tell()

    async def follow(self, after: int) -> AsyncIterator[bytes]:
        """Whole events beyond the number `after`, as they come, until the last one."""
        at = after + 1
        while True:
            while at < self.count:
                events = self._from(at)
                at += len(events)
                yield _END.join([*events, b""])
            if self._ended:
                return
            await self._changed.wait()

    def _from(self, number: int) -> list[bytes]:
        """The events from one on, to the end of its block."""
        if number >= (first := self.count - len(self._recent)):
            return self._recent[number - first :]
        block = bisect_right(self._firsts, number) - 1
        return zlib.decompress(self._blocks[block]).split(_END)[number - self._firsts[block] :]

    def _pack(self) -> None:
        if self._recent:
            self._firsts.append(self.count - len(self._recent))
            self._blocks.append(zlib.compress(_END.join(self._recent), 1))
            self._recent = []

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
