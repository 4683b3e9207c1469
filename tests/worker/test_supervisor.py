"""The supervisor against real processes whose model is fake."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from dashinfer.errors import UnsupportedModel, WorkerError
from dashinfer.types import Chunk, Enter, ModelFiles, SamplingParams, StepPlan, WorkerConfig
from dashinfer.worker import supervisor
from dashinfer.worker.supervisor import WorkerGroup

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")


def config(rank: int = 0, world_size: int = 1) -> WorkerConfig:
    return WorkerConfig(
        rank=rank,
        world_size=world_size,
        files=ModelFiles("fake", "safetensors", (), {}),
        device="cpu",
        data_type="float32",
        load_format="dummy",
        max_batch=2,
        max_length=None,
        max_step_tokens=None,
        block_size=None,
        kv_cache_memory=None,
    )


def command(mode: str) -> list[str]:
    return [sys.executable, str(FAKE_WORKER), mode]


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

    async def start(self, nursery: trio.Nursery):
        async def run(task_status):
            await self.group.run(on_progress=self.progress.append, on_result=self.results.append, task_status=task_status)

        return await nursery.start(run)


async def run_steps(mode: str) -> None:
    """Feed plans until the group fails."""
    with supervisor.one_error():
        async with trio.open_nursery() as nursery:
            recorder = Recorder(WorkerGroup([config()], command=command(mode)))
            await recorder.start(nursery)
            for plan in plans():
                await recorder.group.send(plan)
            await trio.sleep_forever()


async def test_plans_go_out_and_results_come_back():
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(WorkerGroup([config()], command=command("good")))
            ready = await recorder.start(nursery)
            for plan, _ in zip(plans(), range(3), strict=False):
                await recorder.group.send(plan)
            while len(recorder.results) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert ready.architecture == "FakeForCausalLM"
    assert [message.stage for message in recorder.progress] == ["weights"]
    assert [result.step for result in recorder.results] == [0, 1, 2]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("refuse", UnsupportedModel, "this model is not supported"),
        ("crash", WorkerError, "rank 0: RuntimeError: something broke"),
    ],
)
async def test_a_rank_that_cannot_load_says_why(mode, error, message):
    with trio.fail_after(30), pytest.raises(error, match=message):
        await run_steps(mode)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("die", "rank 0 ended with exit status 3; its last words: the fake rank's last words"),
        ("killed", "rank 0 was killed by SIGKILL"),
        ("garbage", "a frame of"),
    ],
)
async def test_a_rank_that_dies_ends_the_group(mode, message):
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps(mode)


async def test_a_stopped_rank_is_noticed_by_its_silence_and_reaped(monkeypatch):
    monkeypatch.setattr(supervisor, "HEARTBEAT_TIMEOUT", 3.0)
    monkeypatch.setattr(supervisor, "EXIT_TIMEOUT", 0.5)
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 0 hangs"):
        await run_steps("stopped")

    assert children() == []


async def test_the_death_of_one_rank_ends_all():
    with trio.fail_after(30), pytest.raises(WorkerError, match="was killed by SIGKILL"), supervisor.one_error():
        async with trio.open_nursery() as nursery:
            group = WorkerGroup([config(0, 2), config(1, 2)], command=command("good"))
            await Recorder(group).start(nursery)
            os.kill(children()[-1], signal.SIGKILL)

    assert children() == []


async def test_cancelling_reaps_the_process():
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await Recorder(WorkerGroup([config()], command=command("good"))).start(nursery)
            assert len(children()) == 1
            nursery.cancel_scope.cancel()

    assert children() == []


def test_no_rank_outlives_a_killed_parent():
    program = f"""
import sys, trio
sys.path[:0] = {[str(FAKE_WORKER.parents[2])]!r}
from tests.worker.test_supervisor import *
async def main():
    async with trio.open_nursery() as nursery:
        await Recorder(WorkerGroup([config()], command=command("good"))).start(nursery)
        print(children()[0], flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        rank = int(parent.stdout.readline())
        parent.kill()
        deadline = time.monotonic() + 2
        while is_alive(rank) and time.monotonic() < deadline:
            time.sleep(0.02)

        assert not is_alive(rank)


def children() -> list[int]:
    """Process ids of this process's living children."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    every_thread = [task / "children" for task in path.parents[1].iterdir()]
    return sorted(int(pid) for each in every_thread for pid in each.read_text().split())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
