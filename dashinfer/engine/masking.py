"""The masks of a step, from its sequences' guides: at once as a rule, and in a thread where a grammar has taken long before."""

from collections.abc import Mapping

import trio

from dashinfer.guidance.guide import Guide

TIMEOUT = 2.0  # seconds for the masks of a step that are computed in a thread


async def compute_masks(guides: Mapping[int, Guide]) -> dict[int, bytes]:
    """A mask for each guide, in their order, but for those that are in error after this."""
    masks: dict[int, bytes] = {}
    while left := {row: guide for row, guide in guides.items() if guide.error is None and row not in masks}:
        attempt = _Attempt(left)
        if any(guide.slow for guide in left.values()):
            await attempt.run_in_thread()
        else:
            attempt.run()
        masks |= attempt.masks
    return {row: masks[row] for row, guide in guides.items() if guide.error is None}


class _Attempt:
    def __init__(self, guides: Mapping[int, Guide]) -> None:
        self.masks: dict[int, bytes] = {}
        self._guides = guides
        self._row: int | None = None  # whose mask is being computed
        self._over = False

    def run(self) -> None:
        for row, guide in self._guides.items():
            self._row = row
            if self._over:
                return
            self.masks[row] = guide.mask()

    async def run_in_thread(self) -> None:
        """As `run`, but a guide whose mask takes too long is in error then, left to the thread, and the last. Who is cancelled
        waits for the thread as well: the guides are needed again where it is the workers that have failed."""
        await trio.lowlevel.checkpoint_if_cancelled()
        finished = False
        try:
            with trio.move_on_after(TIMEOUT, shield=True):
                await trio.to_thread.run_sync(self.run, abandon_on_cancel=True)
                finished = True
        finally:
            self._over = True
            if not finished and self._row is not None:
                self._guides[self._row].error = f"its masks take longer than {TIMEOUT:g} s"
                self.masks = {row: mask for row, mask in self.masks.copy().items() if row != self._row}
