"""`Background`: the nursery of what goes on when the HTTP request that began it has ended.

Every other request is bound to its handler's scope. What runs here is bound to the server's life instead: it is waited for when
the server drains, and cut off as other requests are.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from dashinfer.errors import QueueFull

logger = logging.getLogger(__name__)


class Background:
    """Attributes:
    running: how many tasks there are.
    """

    def __init__(self, most: int) -> None:
        """`most`: tasks at a time."""
        self.running = 0
        self._most = most
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until it is cancelled, which cancels every task."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def check(self) -> None:
        """Raises QueueFull where there is no place for one more."""
        if self.running >= self._most:
            raise QueueFull(f"{self.running} of at most {self._most} requests run in the background already; try again later")

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task; what it raises is logged, and ends nothing else. Raises QueueFull."""
        assert self._nursery is not None, "it is started before requests are"
        self.check()
        self.running += 1
        self._nursery.start_soon(self._run, task)

    async def _run(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except Exception as error:
            logger.error("a task in the background failed", exc_info=error)
        finally:
            self.running -= 1
