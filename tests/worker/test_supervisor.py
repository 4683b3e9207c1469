"""The supervisor against real processes whose model is fake."""

import errno
import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec
import pytest
import trio

from dashinfer.errors import InsufficientMemory, PeerLost, StartupError, UnsupportedModel, WorkerError
from dashinfer.types import Chunk, Enter, OutOfMemory, Reset, SamplingParams, StepPlan
from dashinfer.worker import supervisor
from dashinfer.worker.processes import Template
from dashinfer.worker.supervisor import WorkerGroup
from tests.process_tree import any_left

from .ranks import Recorder, command, config, group, pids, plans, run_steps


@pytest.fixture(scope="module")
def forks() -> Iterator[Template]:
    with Template(command("named")) as template:
        yield template


@pytest.fixture(params=["spawned", "forked"])
def template(request) -> Template | None:
    """What starts ranks; None: their command."""
    return request.getfixturevalue("forks") if request.param == "forked" else None


@pytest.mark.parametrize(("mode", "stages"), [("good", ["weights"]), ("queued", [])])
async def test_plans_go_out_and_results_come_back(mode, stages, template):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group(mode, template=template))
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
    ("mode", "size", "error", "message"),
    [
        ("refuse", 1, UnsupportedModel, "this model is not supported"),
        ("crash", 1, WorkerError, "rank 0: RuntimeError: something broke"),
        ("illegal", 1, WorkerError, "rank 0: RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("exhausted", 2, InsufficientMemory, "fake: memory ran out in a step"),
    ],
)
async def test_a_rank_that_fails_says_why(mode, size, error, message):
    with trio.fail_after(30), pytest.raises(error, match=message):
        await run_steps(mode, size)


async def test_a_lone_rank_without_memory_drops_plans_until_it_is_reset():
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("exhausted"))
            await recorder.start(nursery)
            sent = list(islice(plans(), 4))
            for plan in sent:
                await recorder.group.send(plan)
            while not recorder.memory:
                await trio.sleep(0.01)
            await recorder.group.send(Reset())
            for plan in sent[:2]:
                await recorder.group.send(msgspec.structs.replace(plan, step=plan.step + 4))
            while len(recorder.results) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert [message.step for message in recorder.memory] == [2]
    assert [result.step for result in recorder.results] == [0, 1, 4]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("die", "rank 0 ended with exit status 3; its last words: the fake rank's last words"),
        ("killed", "rank 0 was killed by SIGKILL"),
        ("realtime", f"rank 0 was killed by signal {signal.SIGRTMIN + 1}"),
        ("garbage", "a frame of"),
    ],
)
async def test_a_rank_that_dies_ends_the_group(mode, message, template, children):
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps(mode, template=template)

    assert children() == []


async def test_a_rank_that_dies_while_loading_ends_the_group(template):
    message = "rank 0 was killed by SIGKILL; its last words: out of something"
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps("lost", template=template)


async def test_what_a_rank_has_started_ends_with_it(template, caplog):
    caplog.set_level("INFO", logger="dashinfer.worker")
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 0 ended with exit status 3; its last words: child"):
        await run_steps("mother", template=template)

    (child,) = [int(text.partition("child ")[2]) for text in caplog.messages if "child " in text]
    assert any_left([child]) == []


@pytest.mark.parametrize("forked", [False, True])
async def test_a_program_that_is_not_there(forked, children):
    command = ["/no/such/program"]
    with (
        trio.fail_after(30),
        Template(command) as template,
        pytest.raises(StartupError, match=r"the process of rank 0 cannot be started: .*No such file"),
    ):
        workers = WorkerGroup([config()], command=command, template=template if forked else None)
        await workers.run(on_progress=print, on_result=print)

    assert children() == []


async def test_a_rank_without_a_socket(monkeypatch):
    def refuse():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(supervisor.socket, "socketpair", refuse)
    with trio.fail_after(30), pytest.raises(StartupError, match=r"the process of rank 0 cannot be started: .*Too many open"):
        await group("good").run(on_progress=print, on_result=print)


@pytest.mark.parametrize(("mode", "patience"), [("stopped", 1), ("frozen", 2)])
async def test_a_stopped_rank_is_noticed_by_its_silence_and_reaped(mode, patience, template, monkeypatch, children):
    monkeypatch.setattr(supervisor, "LOADING_SILENCE", 2.0)
    monkeypatch.setattr(supervisor, "HEARTBEAT_GRACE", 0.1)
    with trio.fail_after(30), pytest.raises(WorkerError, match=f"rank 0 hangs: no sign of life for {patience} s"):
        await run_steps(mode, template=template, heartbeat_timeout=1.0)

    assert children() == []


async def test_a_rank_that_speaks_again_within_the_grace_goes_on(monkeypatch, caplog):
    """A parent that was stopped together with its ranks finds the deadline past when it comes to itself."""
    monkeypatch.setattr(supervisor, "HEARTBEAT_GRACE", 20.0)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("stopped", heartbeat_timeout=1.0))
            await recorder.start(nursery)
            for plan, _ in zip(plans(), range(3), strict=False):
                await recorder.group.send(plan)
            while "rank 0: no sign of life for 1 s" not in caplog.messages:
                await trio.sleep(0.01)
            while len(recorder.results) < 3:
                os.kill(pids(recorder.group)[0], signal.SIGCONT)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert [result.step for result in recorder.results] == [0, 1, 2]


async def test_a_line_without_end_is_cut(caplog):
    caplog.set_level("INFO", logger="dashinfer.worker")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("talk"))
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
            ready = await Recorder(group("uneven", 2)).start(nursery)
            nursery.cancel_scope.cancel()

    assert ready.num_blocks == 64 - 5


async def test_a_rank_that_cannot_read_its_parent_says_so():
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 0: a frame of 4294967295 bytes"), supervisor.one_error():
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("good"))
            await recorder.start(nursery)
            await recorder.group._ranks[0].send_frame(b"\xff" * 64)
            await trio.sleep_forever()


async def test_a_rank_without_memory_for_a_step_goes_on():
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("short"))
            await recorder.start(nursery)
            for plan, _ in zip(plans(), range(4), strict=False):
                await recorder.group.send(plan)
            while len(recorder.results) < 4:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert recorder.memory == [OutOfMemory(2)]


# -- groups of several ranks


@pytest.mark.parametrize("stages", [1, 2])
async def test_results_are_those_of_the_last_stage(stages):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("good", 2, stages=stages))
            await recorder.start(nursery)
            for plan, _ in zip(plans(), range(3), strict=False):
                await recorder.group.send(plan)
            while len(recorder.results) < 3:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

    assert [result.step for result in recorder.results] == [0, 1, 2]
    assert len(recorder.progress) == 1


@pytest.mark.parametrize(
    ("mode", "stages", "message"),
    [
        ("good,chatty", 1, "rank 1 sent a StepResult"),
        ("chatty,good", 2, "rank 0 sent a StepResult"),
        ("good,short", 1, "rank 1 sent a OutOfMemory"),
    ],
)
async def test_a_rank_that_speaks_out_of_turn(mode, stages, message):
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps(mode, 2, stages=stages)


async def test_ranks_meet_in_a_private_place_that_goes_with_them(caplog):
    caplog.set_level("INFO", logger="dashinfer.worker")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await Recorder(group("away", 2)).start(nursery)
            while len(places := {text.partition("file://")[2] for text in caplog.messages if "meets" in text}) < 1:
                await trio.sleep(0.01)
            directory = Path(places.pop()).parent
            mode = directory.stat().st_mode & 0o777
            nursery.cancel_scope.cancel()

    said = sorted(text for text in caplog.messages if "meets" in text)
    assert said == [f"rank {rank}: meets at file://{directory}/rendezvous" for rank in range(2)]
    assert mode == 0o700
    assert not directory.exists()


async def test_a_single_rank_meets_nobody_and_a_place_that_is_given_stays():
    given = [msgspec.structs.replace(config(rank, 2), rendezvous="tcp://10.0.0.1:1") for rank in range(2)]
    with supervisor._meeting([config()]) as alone, supervisor._meeting(given) as two:
        assert [each.rendezvous for each in [*alone, *two]] == ["", "tcp://10.0.0.1:1", "tcp://10.0.0.1:1"]


async def test_the_death_of_one_rank_ends_all_at_once(template, children):
    """Though others are in the midst of something, or stopped."""
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 1 was killed by SIGKILL"), supervisor.one_error():
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("hang,good", 3, template=template))
            await recorder.start(nursery)
            for plan, _ in zip(plans(), range(3), strict=False):
                await recorder.group.send(plan)
            os.kill(pids(recorder.group)[2], signal.SIGSTOP)
            os.kill(pids(recorder.group)[1], signal.SIGKILL)
            begun = trio.current_time()
            try:
                await trio.sleep_forever()
            finally:
                elapsed = trio.current_time() - begun
                left = children()

    assert left == []
    assert elapsed < 2  # and not the time that a rank has to end by itself


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("lonely,good,late", "rank 2 ended with exit status 3; its last words: the fake rank's last words"),
        ("good,lonely,good", "rank 1: connection closed by peer"),
        ("closed,good,lonely", "rank 2: connection closed by peer"),
    ],
)
async def test_the_cause_is_told_rather_than_what_it_led_to(mode, message, children, monkeypatch):
    monkeypatch.setattr(supervisor, "EXIT_TIMEOUT", 0.2)
    with trio.fail_after(30), pytest.raises(WorkerError, match=message):
        await run_steps(mode, 3)

    assert children() == []


async def test_a_rank_that_closes_its_connection_is_ended(template, children, monkeypatch):
    monkeypatch.setattr(supervisor, "EXIT_TIMEOUT", 0.2)
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 1 closed its connection"):
        await run_steps("good,closed", 2, template=template)

    assert children() == []


def test_of_several_errors_the_cause_leaves():
    gone, lost, closed = WorkerError("gone"), PeerLost("lost"), supervisor.Disconnected("closed")
    for errors, expected in (
        (ExceptionGroup("", [closed, ExceptionGroup("", [lost, gone])]), gone),
        (ExceptionGroup("", [closed, lost]), lost),
        (ExceptionGroup("", [gone, WorkerError("later")]), gone),
    ):
        with pytest.raises(WorkerError) as caught, supervisor.one_error():
            raise errors
        assert caught.value is expected


async def test_a_stopped_rank_that_takes_no_frames_keeps_none_from_others(monkeypatch, children):
    monkeypatch.setattr(supervisor, "HEARTBEAT_GRACE", 0.1)
    params = SamplingParams(max_tokens=50, seed=0, stop_token_ids=tuple(range(100, 200_000)))  # more than a socket's buffer
    large = StepPlan(0, [Enter(0, b"\x01\x00\x00\x00", 1, params)], [Chunk(0, 0, 1, True, tuple(range(16)))])
    answered = None
    with trio.fail_after(30), pytest.raises(WorkerError, match="rank 0 hangs: no sign of life for 3 s"), supervisor.one_error():
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("good", 3, stages=3, heartbeat_timeout=3.0))
            await recorder.start(nursery)
            os.kill(pids(recorder.group)[0], signal.SIGSTOP)
            begun = trio.current_time()
            nursery.start_soon(recorder.group.send, large)
            while not recorder.results:
                await trio.sleep(0.01)
            answered = trio.current_time() - begun
            await trio.sleep_forever()

    assert answered is not None and answered < 3
    assert trio.current_time() - begun < 6
    assert children() == []


async def test_no_rank_has_a_socket_of_another(template):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group("good", 3, template=template))
            await recorder.start(nursery)
            owned = [sockets(pid) for pid in pids(recorder.group)]
            nursery.cancel_scope.cancel()

    assert [len(each) for each in owned] == [1, 1, 1]
    assert len(set.union(*owned)) == 3


async def test_cancelling_reaps_the_process(template, children):
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await Recorder(group("good", template=template)).start(nursery)
            assert len(children()) == 1
            nursery.cancel_scope.cancel()

    assert children() == []


def sockets(pid: int) -> set[str]:
    """Names of the sockets that a process has open."""
    return {name for each in Path(f"/proc/{pid}/fd").iterdir() if (name := os.readlink(each)).startswith("socket:")}
