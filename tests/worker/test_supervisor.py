"""The supervisor against real processes whose model is fake."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from dashinfer.errors import InsufficientMemory, StartupError, UnsupportedModel, WorkerError
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


@pytest.mark.parametrize(("mode", "stages"), [("good", ["weights"]), ("queued", [])])
async def test_plans_go_out_and_results_come_back(mode, stages):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(WorkerGroup([config()], command=command(mode)))
            ready = await recorder.start(nursery)
            for plan, _ in zip(plans(), range(4 if mode == "queued" else 3), strict=False):
                await recorder.group.send(plan)
            while len(recorder.results) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert ready.architecture == "FakeForCausalLM"
    assert [message.stage for message in recorder.progress] == stages
    assert [result.step for result in recorder.results] == [0, 1, 2]


@pytest.mark.parametrize(
    ("mode", "error", "message"),
    [
        ("refuse", UnsupportedModel, "this model is not supported"),
        ("crash", WorkerError, "rank 0: RuntimeError: something broke"),
        ("illegal", WorkerError, "rank 0: RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("exhausted", InsufficientMemory, "fake: memory ran out in a step"),
    ],
)
async def test_a_rank_that_fails_says_why(mode, error, message):
    with trio.fail_after(30), pytest.raises(error, match=message):
        await run_steps(mode)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("die", "rank 0 ended with exit status 3; its last words: the fake rank's last words"),
        ("killed", "rank 0 was killed by SIGKILL"),
        ("realtime", f"rank 0 was killed by signal {signal.SIGRTMIN + 1}"),
        ("garbage", "a frame of"),
    ],
)
async def test_a_rank_that_dies_ends_the_group(mode, message):
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps(mode)


async def test_a_rank_that_dies_while_loading_ends_the_group():
    message = "rank 0 was killed by SIGKILL; its last words: out of something"
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps("lost")


async def test_a_program_that_is_not_there(children):
    with trio.fail_after(30), pytest.raises(StartupError, match=r"the process of rank 0 cannot be started: .*No such file"):
        await WorkerGroup([config()], command=["/no/such/program"]).run(on_progress=print, on_result=print)

    assert children() == []


async def test_a_stopped_rank_is_noticed_by_its_silence_and_reaped(monkeypatch, children):
    monkeypatch.setattr(supervisor, "HEARTBEAT_TIMEOUT", 3.0)
    monkeypatch.setattr(supervisor, "HEARTBEAT_GRACE", 0.1)
    monkeypatch.setattr(supervisor, "EXIT_TIMEOUT", 0.5)
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 0 hangs"):
        await run_steps("stopped")

    assert children() == []


async def test_a_rank_that_speaks_again_within_the_grace_goes_on(monkeypatch, caplog, children):
    """A parent that was stopped together with its ranks finds the deadline past when it comes to itself."""
    monkeypatch.setattr(supervisor, "HEARTBEAT_TIMEOUT", 3.0)
    monkeypatch.setattr(supervisor, "HEARTBEAT_GRACE", 20.0)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(WorkerGroup([config()], command=command("stopped")))
            await recorder.start(nursery)
            for plan, _ in zip(plans(), range(3), strict=False):
                await recorder.group.send(plan)
            while "rank 0: no sign of life for 3 s" not in caplog.messages:
                await trio.sleep(0.01)
            os.kill(children()[0], signal.SIGCONT)
            while len(recorder.results) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert [result.step for result in recorder.results] == [0, 1, 2]


async def test_a_line_without_end_is_cut(caplog):
    caplog.set_level("INFO", logger="dashinfer.worker")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(WorkerGroup([config()], command=command("talk")))
            await recorder.start(nursery)
            for plan, _ in zip(plans(), range(3), strict=False):
                await recorder.group.send(plan)
            while not any("xxx" in text for text in caplog.messages):
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert max(map(len, caplog.messages)) <= supervisor.LONGEST_LINE + len("rank 0: ")


async def test_the_fewest_blocks_of_any_rank_count():
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            ready = await Recorder(WorkerGroup([config(0, 2), config(1, 2)], command=command("uneven"))).start(nursery)
            nursery.cancel_scope.cancel()

    assert ready.num_blocks == 64 - 5


async def test_a_rank_that_cannot_read_its_parent_says_so():
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 0: a frame of 4294967295 bytes"), supervisor.one_error():
        async with trio.open_nursery() as nursery:
            group = WorkerGroup([config()], command=command("good"))
            await Recorder(group).start(nursery)
            await group._ranks[0].send_frame(b"\xff" * 64)
            await trio.sleep_forever()


async def test_the_death_of_one_rank_ends_all(children):
    with trio.fail_after(30), pytest.raises(WorkerError, match="was killed by SIGKILL"), supervisor.one_error():
        async with trio.open_nursery() as nursery:
            group = WorkerGroup([config(0, 2), config(1, 2)], command=command("good"))
            await Recorder(group).start(nursery)
            os.kill(children()[-1], signal.SIGKILL)

    assert children() == []


async def test_cancelling_reaps_the_process(children):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await Recorder(WorkerGroup([config()], command=command("good"))).start(nursery)
            assert len(children()) == 1
            nursery.cancel_scope.cancel()

    assert children() == []


@pytest.mark.parametrize("mode", ["good", "loading"])
def test_no_rank_outlives_a_killed_parent(mode):
    program = f"""
import sys, trio
sys.path[:0] = {[str(FAKE_WORKER.parents[2])]!r}
from tests.worker.test_supervisor import *
async def main():
    async with trio.open_nursery() as nursery:
        recorder = Recorder(WorkerGroup([config()], command=command({mode!r})))
        nursery.start_soon(recorder.start, nursery)
        while not recorder.progress:
            await trio.sleep(0.01)
        print(*all_children(), flush=True)
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


@pytest.fixture
def children() -> Callable[[], list[int]]:
    """Process ids of the living children that this process got since the test began."""
    before = set(all_children())
    return lambda: [pid for pid in all_children() if pid not in before]


def all_children() -> list[int]:
    """Process ids of this process's living children."""
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    every_thread = [task / "children" for task in path.parents[1].iterdir()]
    return sorted(int(pid) for each in every_thread for pid in each.read_text().split())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
