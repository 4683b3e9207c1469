"""`MediaBudget`: how much memory the media of all requests may take together, and who waits until there is room.

A request has an account. What it takes is granted while the budget lasts, the older request first. The oldest of those that
may still take more is never kept waiting, even beyond the budget: so there is always one that gets done and gives back, and
what is taken in all is the budget and one request's worth. Counts bytes that others hold; holds none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from dashinfer.errors import QueueFull


class MediaBudget:
    """Attributes:
    size: bytes to be taken in all.
    used: bytes that are taken.
    """

    def __init__(self, size: int, *, max_waiting: int) -> None:
        """`max_waiting`: requests that may wait before the first byte; one more is refused."""
        self.size = size
        self.used = 0
        self._max_waiting = max_waiting
        self._taking: dict[MediaAccount, None] = {}  # that may take more, oldest first
        self._waiting: dict[MediaAccount, int] = {}  # how many of its tasks wait
        self._changed = trio.Event()

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @contextmanager
    def open(self) -> Iterator["MediaAccount"]:
        """A request's account. What it holds at the end is given back."""
        account = MediaAccount(self)
        self._taking[account] = None
        try:
            yield account
        finally:
            self._taking.pop(account, None)
            account.give(account.held)

    def _grants(self, account: "MediaAccount", size: int) -> bool:
        for other in self._taking:  # in the order of age
            if other is account:
                return self.used + size <= self.size or account is next(iter(self._taking))
            if other in self._waiting:
                return False
        raise AssertionError("a settled account takes no more")

    async def _take(self, account: "MediaAccount", size: int) -> None:
        if not self._grants(account, size):
            if not account.held and account not in self._waiting and len(self._waiting) >= self._max_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait for memory for their images and videos; try again later")
            self._waiting[account] = self._waiting.get(account, 0) + 1
            try:
                while not self._grants(account, size):
                    await self._changed.wait()
            finally:
                self._waiting[account] -= 1
                if not self._waiting[account]:
                    del self._waiting[account]
                self._notify()
        account.held += size
        self.used += size

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class MediaAccount:
    """One request's share. Attributes: held: bytes."""

    def __init__(self, budget: MediaBudget) -> None:
        self.held = 0
        self._budget = budget

    async def take(self, size: int) -> None:
        """Take `size` bytes more, once there is room.

        Raises:
            QueueFull: the account holds nothing yet, and too many wait already.
        """
        await self._budget._take(self, size)

    def give(self, size: int) -> None:
        """Give `size` bytes back."""
        assert 0 <= size <= self.held
        self.held -= size
        self._budget.used -= size
        self._budget._notify()

    def settle(self, size: int) -> None:
        """Keep `size` bytes to the end, and take no more."""
        self.give(self.held - size)
        self._budget._taking.pop(self, None)
        self._budget._notify()
