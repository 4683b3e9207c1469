"""Which ranks of a group are sent what, with ranks that only write it down."""

from functools import partial

import msgspec
import pytest
import trio

from dashinfer.types import FromParent, Masks, ModelFiles, Ready, Reset, StepPlan, WorkerConfig
from dashinfer.worker.frames import encode
from dashinfer.worker.supervisor import WorkerGroup

CONFIG = WorkerConfig(0, 1, ModelFiles("fake", "safetensors", (), {}), "cpu", "float32", "auto", 2, None, None, None, None)
READY = Ready("F", "llm", "cpu", "float32", 50, 64, 32, 4, 64, 0, 0)
MESSAGES: list[FromParent] = [StepPlan(0, [], [], masked=True), Masks(0, (0,), b"mask"), Reset()]


def ignore(message: object) -> None:
    """Nothing is said."""


class Listening:
    """Implements `dashinfer.worker.supervisor.AnyRank`."""

    def __init__(self, config: WorkerConfig) -> None:
        self.heard: list[bytes] = []

    async def run(self, on_message, *, task_status) -> None:
        task_status.started(READY)
        await trio.sleep_forever()

    async def send_frame(self, frame: bytes) -> None:
        self.heard.append(frame)

    def kill(self) -> None: ...


@pytest.mark.parametrize(("size", "stages", "sampler"), [(1, 1, 0), (4, 1, 0), (4, 2, 2), (3, 3, 2)])
async def test_masks_go_to_the_rank_that_samples_alone(size: int, stages: int, sampler: int) -> None:
    configs = [
        msgspec.structs.replace(CONFIG, rank=rank, world_size=size, pipeline_parallel=stages, rendezvous="none")
        for rank in range(size)
    ]
    ranks: list[Listening] = []

    def make_rank(config: WorkerConfig) -> Listening:
        ranks.append(Listening(config))
        return ranks[-1]

    group = WorkerGroup(configs, make_rank=make_rank)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(group.run, on_progress=ignore, on_result=ignore))
        for message in MESSAGES:
            await group.send(message)
        nursery.cancel_scope.cancel()

    everything = [encode(message) for message in MESSAGES]
    without_masks = [everything[0], everything[2]]
    assert [rank.heard for rank in ranks] == [everything if rank == sampler else without_masks for rank in range(size)]
