"""Ranks of tests: processes that meet once and then run one job after the other, each with a model of its own.

`python -m tests.worker.tensor_ranks RANK FOLDER` takes its jobs from FOLDER/jobs and leaves what came of them in FOLDER/RANK.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from dashinfer.types import Ready, StepPlan, StepResult, WorkerConfig

WORLD_SIZE = 4


class Job(msgspec.Struct):
    """Load the model, on the first `config.world_size` ranks, and run the plans. Ranks that have a `config.rendezvous` share
    memory, as those of one machine do; others speak gloo."""

    config: WorkerConfig
    plans: list[StepPlan] = []
    free: list[int] = []  # bytes of memory that each rank finds; none: what there is


class Done(msgspec.Struct):
    """What one rank has of a job."""

    error: str = ""  # that loading ended with
    ready: Ready | None = None
    results: list[StepResult] = []
    read: int = 0  # bytes of weights


def run_jobs(folder: Path, jobs: Sequence[Job]) -> list[list[Done]]:
    """For each job, what its ranks say."""
    (folder / "jobs").write_bytes(msgspec.msgpack.encode(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-m", "tests.worker.tensor_ranks", str(rank), str(folder)], env=environment)
        for rank in range(WORLD_SIZE)
    ]
    try:
        for rank in ranks:
            assert rank.wait(timeout=240) == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    decode = msgspec.msgpack.Decoder(list[Done]).decode
    done = [decode((folder / str(rank)).read_bytes()) for rank in range(WORLD_SIZE)]
    return [[one[number] for one in done[: job.config.world_size]] for number, job in enumerate(jobs)]


def main(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from dashinfer.errors import StartupError
    from dashinfer.models.config import ModelConfig
    from dashinfer.models.weights import SafetensorsSource
    from dashinfer.worker import runner as runner_module
    from dashinfer.worker.distributed import join, make_world

    jobs = msgspec.msgpack.Decoder(list[Job]).decode((folder / "jobs").read_bytes())
    config = msgspec.structs.replace(jobs[0].config, rank=rank, world_size=WORLD_SIZE, rendezvous=f"file://{folder}/store")
    join(config, torch.device("cpu"))
    sizes = {WORLD_SIZE: None, 2: dist.new_group([0, 1])}
    worlds = {}
    for one in (job.config for job in jobs):
        size, stages, rendezvous = key = one.world_size, one.pipeline_parallel, one.rendezvous
        if key not in worlds:
            split = msgspec.structs.replace(
                config, world_size=size, pipeline_parallel=stages, rendezvous=rendezvous if rank < size else ""
            )
            worlds[key] = make_world(split, torch.device("cpu"), sizes[size])

    read_stored, read = SafetensorsSource.read_stored, 0

    def counting(self, part):
        nonlocal read
        found = read_stored(self, part)
        read += found.nbytes
        return found

    SafetensorsSource.read_stored = counting
    free_memory = runner_module.free_memory
    done = []
    for job in jobs:
        size = job.config.world_size
        if rank >= size:
            done.append(Done())
            continue
        read = 0
        config = msgspec.structs.replace(job.config, rank=rank)
        runner_module.free_memory = (lambda *_, found=job.free: found[rank]) if job.free else free_memory
        world = worlds[size, config.pipeline_parallel, config.rendezvous]
        world = replace(world, group=replace(world.group, ordered=config.deterministic and world.group.world_size > 2))
        try:
            runner = runner_module.Runner(config, ModelConfig.from_hf(config.files.config, vision=True), lambda *_: None, world)
        except StartupError as error:
            done.append(Done(f"{type(error).__name__}: {error}"))
            continue
        done.append(Done("", runner.ready, [runner.execute(plan) for plan in job.plans], read))
        runner._executor.settle()
    (folder / str(rank)).write_bytes(msgspec.msgpack.encode(done))
    world = worlds = None
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
