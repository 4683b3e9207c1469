"""Groups of real processes whose model is fake, for tests of what starts, watches and ends them."""

import sys
from pathlib import Path

import trio

from dashinfer.types import Chunk, Enter, ModelFiles, SamplingParams, StepPlan, WorkerConfig
from dashinfer.worker.processes import Template
from dashinfer.worker.supervisor import WorkerGroup, one_error
from tests.process_tree import children_of, templates_of, workers_of

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


def config(rank: int = 0, world_size: int = 1, pipeline_parallel: int = 1, mode: str = "fake") -> WorkerConfig:
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        files=ModelFiles(mode, "safetensors", (), {}),
        device="cpu",
        data_type="float32",
        load_format="dummy",
        max_batch=2,
        max_length=None,
        max_step_tokens=None,
        block_size=None,
        kv_cache_memory=None,
        pipeline_parallel=pipeline_parallel,
    )


def command(mode: str) -> list[str]:
    return [sys.executable, str(FAKE_WORKER), mode]


def group(
    mode: str, size: int = 1, *, stages: int = 1, template: Template | None = None, heartbeat_timeout: float = 10.0
) -> WorkerGroup:
    """`template`: of a `named` fake worker."""
    configs = [config(rank, size, stages, mode) for rank in range(size)]
    return WorkerGroup(configs, command=command(mode), template=template, heartbeat_timeout=heartbeat_timeout)


def pids(group: WorkerGroup) -> list[int]:
    """Process ids of its ranks."""
    return [rank._process.pid for rank in group._ranks]


def plans():
    """Steps of one endless sequence."""
    params = SamplingParams(max_tokens=50, seed=0)
    yield StepPlan(0, [Enter(0, b"\x01\x00\x00\x00", 1, params)], [Chunk(0, 0, 1, True, tuple(range(16)))])
    for step in range(1, 50):
        yield StepPlan(step, [], [Chunk(0, step, 1, True, ())])


class Recorder:
    """Runs a group in the background and notes what it says."""

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group
        self.progress: list = []
        self.results: list = []
        self.memory: list = []

    async def start(self, nursery: trio.Nursery):
        async def run(task_status):
            await self.group.run(
                on_progress=self.progress.append,
                on_result=self.results.append,
                on_memory=self.memory.append,
                task_status=task_status,
            )

        return await nursery.start(run)


async def run_steps(mode: str, size: int = 1, **kwargs) -> None:
    """Feed plans until the group fails."""
    with one_error():
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group(mode, size, **kwargs))
            await recorder.start(nursery)
            for plan in plans():
                await recorder.group.send(plan)
            await trio.sleep_forever()


def templates() -> list[int]:
    """Process ids of this process's templates."""
    return templates_of("self")


def all_children() -> list[int]:
    """Process ids of this process's children, and of those of its templates in place of those."""
    return sorted({*children_of("self"), *workers_of("self")} - set(templates()))
