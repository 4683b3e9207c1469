"""Masks on their way to the thread that samples."""

import threading

import pytest

from dashinfer.types import Masks
from dashinfer.worker.masks import MaskInbox


def masks(step: int) -> Masks:
    return Masks(step, (0,), b"mask")


@pytest.mark.parametrize("stages", [1, 8, 16])
def test_masks_of_all_steps_that_a_pipeline_has_are_kept(stages):
    inbox = MaskInbox(stages + 1)
    for step in range(stages + 1):
        inbox.put(masks(step))

    assert [inbox.take(step) for step in range(stages + 1)] == [masks(step) for step in range(stages + 1)]


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_that_was_dropped_waits_for_no_masks(waits):
    """Those of the steps after the reset are there already, or never come."""
    inbox, found = MaskInbox(), []
    thread = threading.Thread(target=lambda: found.append(inbox.take(3)), daemon=True)
    if waits:
        thread.start()
        thread.join(0.05)
    inbox.interrupt()
    inbox.put(masks(4))
    if not waits:
        thread.start()
    thread.join(5)
    inbox.resume()

    assert found == [Masks(3, (), b"")]
    assert inbox.take(4) == masks(4)
