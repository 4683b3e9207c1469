"""`MaskInbox`: masks on their way from the thread that reads frames to the one that samples."""

import threading
from collections import deque

from dashinfer.types import Masks

_KEPT = 8  # of ranks that take none, and of steps that were dropped; more are never under way


class MaskInbox:
    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._waiting: deque[Masks] = deque(maxlen=_KEPT)

    def put(self, masks: Masks) -> None:
        with self._arrived:
            self._waiting.append(masks)
            self._arrived.notify()

    def take(self, step: int) -> Masks:
        """Those of this step, once they are there. Masks come in the order of their steps; earlier ones are dropped."""
        with self._arrived:
            while True:
                while self._waiting:
                    masks = self._waiting.popleft()
                    if masks.step == step:
                        return masks
                    assert masks.step < step
                self._arrived.wait()
