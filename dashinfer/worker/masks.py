"""`MaskInbox`: masks on their way from the thread that reads frames to the one that samples."""

import threading
from collections import deque

from dashinfer.types import Masks

_KEPT = 8  # at least


class MaskInbox:
    def __init__(self, under_way: int = 2) -> None:
        """`under_way`: steps at most. Masks of at least as many are kept."""
        self._arrived = threading.Condition()
        self._waiting: deque[Masks] = deque(maxlen=max(_KEPT, under_way))
        self._resets = 0  # that were read and not yet come to

    def put(self, masks: Masks) -> None:
        with self._arrived:
            self._waiting.append(masks)
            self._arrived.notify()

    def interrupt(self) -> None:
        """A `Reset` has been read: masks of the steps before it may never come, and nobody wants to know what those sample."""
        with self._arrived:
            self._resets += 1
            self._arrived.notify()

    def resume(self) -> None:
        """The steps before a `Reset` are over."""
        with self._arrived:
            self._resets -= 1

    def take(self, step: int) -> Masks:
        """Those of this step, once they are there; none for one that a `Reset` follows. Masks come in the order of their steps;
        earlier ones are dropped."""
        with self._arrived:
            while not self._resets:
                while self._waiting:
                    masks = self._waiting.popleft()
                    if masks.step == step:
                        return masks
                    assert masks.step < step
                self._arrived.wait()
            return Masks(step, (), b"")
