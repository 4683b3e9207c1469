"""Templates against real processes whose model is fake. What holds for ranks however they start is in `test_supervisor`."""

import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from dashinfer.errors import StartupError, WorkerError
from dashinfer.worker import processes
from dashinfer.worker.processes import Template
from dashinfer.worker.supervisor import one_error
from tests.process_tree import any_left, children_of, is_alive

from .ranks import Recorder, command, group, pids, plans, run_steps, templates

FILES_OF_TEMPLATE = 4  # standard ones and its socket, however many ranks it has forked


@asynccontextmanager
async def ready(mode: str, size: int = 1, **kwargs) -> AsyncIterator[Recorder]:
    """A group of ranks that are ready, and are ended then."""
    with trio.fail_after(30), one_error():
        async with trio.open_nursery() as nursery:
            recorder = Recorder(group(mode, size, **kwargs))
            await recorder.start(nursery)
            yield recorder
            nursery.cancel_scope.cancel()


async def results(recorder: Recorder, count: int) -> None:
    for plan, _ in zip(plans(), range(count), strict=False):
        await recorder.group.send(plan)
    while len(recorder.results) < count:
        await trio.sleep(0.01)


async def births(caplog: pytest.LogCaptureFixture, template: Template | None) -> list[dict]:
    """What two ranks say of how they were born."""
    caplog.clear()
    async with ready("naked", 2, template=template) as recorder:
        await results(recorder, 3)
        while len(said := [text for text in caplog.messages if "environment" in text]) < 2:
            await trio.sleep(0.01)
    return [json.loads(text.partition(": ")[2]) for text in said]


async def test_a_forked_rank_is_born_as_a_program_is(caplog, monkeypatch):
    caplog.set_level("INFO", logger="dashinfer.worker")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    program, _ = await births(caplog, None)
    with Template(command("named")) as template:
        first, second = await births(caplog, template)
        third, fourth = await births(caplog, template)

    assert "OMP_NUM_THREADS=3" in program["environment"]
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY=128" in program["environment"]
    assert program["leader"] and program["outputs"]
    assert program["files"] == ["/dev/null", "pipe", "pipe", "socket"]
    assert first == second == third == fourth == program


async def test_groups_have_one_template_which_ends_with_its_last_user_and_leaves_nothing(children):
    files = len(os.listdir("/proc/self/fd"))
    with Template(command("named")) as template:
        seen = set()
        with template:
            for _ in range(2):
                async with ready("good", 2, template=template) as recorder:
                    assert sorted(pids(recorder.group)) == children()
                    seen |= {*templates()}
        (pid,) = seen
        assert is_alive(pid)
        for _ in range(2):
            with trio.fail_after(2):
                while len(os.listdir(f"/proc/{pid}/fd")) > FILES_OF_TEMPLATE:  # it tells of an end before it closes
                    await trio.sleep(0.01)
            async with ready("good", 2, template=template):
                pass

    assert pid not in children_of("self")
    assert children() == []
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # trio's own, which comes with its first thread


async def test_a_template_that_waits_costs_nothing():
    with Template(command("named")) as template:
        async with ready("good", template=template) as recorder:
            (pid,) = templates()
            before: list[str] = []
            while before != (before := ticks(pid)):  # it has just forked
                await trio.sleep(0.05)
            await results(recorder, 20)

            assert ticks(pid) == before
            assert len(os.listdir(f"/proc/{pid}/task")) == 1


def ticks(pid: int) -> list[str]:
    """CPU time of a process, and how often it went to sleep."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [*Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13], *(x for x in status if "ctxt" in x)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_ranks_outlive_their_template_and_the_next_ones_have_another(number, monkeypatch):
    """The end of such a rank is noticed; only the status is not known."""
    monkeypatch.setattr(processes, "STATUS_TIMEOUT", 0.2)
    monkeypatch.setattr(processes, "FORK_TIMEOUT", 0.2)
    with Template(command("named")) as template:
        with pytest.raises(WorkerError, match="rank 0 ended"):
            async with ready("good", 2, template=template) as recorder:
                (old,) = templates()
                os.kill(old, number)
                await results(recorder, 3)
                ranks = pids(recorder.group)
                os.kill(ranks[0], signal.SIGKILL)
                await trio.sleep_forever()
        if number == signal.SIGSTOP:  # is noticed when it is needed
            with pytest.raises(WorkerError, match="the template of ranks hangs"):
                await run_steps("good", template=template)
        async with ready("good", 2, template=template) as recorder:
            await results(recorder, 3)

            assert templates() != [old]

    assert any_left([*ranks, old]) == []


@pytest.mark.parametrize(
    ("mode", "trouble"), [("broken", "was killed by SIGKILL; its last words: the fake template's"), ("stuck", "hangs")]
)
async def test_a_template_that_does_not_come_about_is_told_of(mode, trouble, monkeypatch, children):
    monkeypatch.setattr(processes, "LOADING_SILENCE", 2.0)
    with (
        trio.fail_after(30),
        Template(command(mode)) as template,
        pytest.raises(WorkerError, match=f"the template of ranks {trouble}"),
    ):
        await run_steps("good", template=template)

    assert children() == []


async def test_a_template_that_fails_later_says_why(children):
    trouble = r"ended with exit status 1; its last words: Traceback .* \| RuntimeError: something in the template broke"
    with (
        trio.fail_after(30),
        Template(command("falling")) as template,
        pytest.raises(WorkerError, match=f"^the template of ranks {trouble}$"),
    ):
        await run_steps("good", template=template)

    assert children() == []


async def test_how_a_template_ended_is_told_when_another_one_starts(caplog):
    with Template(command("named")) as template:
        async with ready("good", template=template):
            (pid,) = templates()
        os.kill(pid, signal.SIGKILL)
        while is_alive(pid):
            await trio.sleep(0.01)
        async with ready("good", template=template):
            pass

    assert caplog.messages == ["the template of ranks was killed by SIGKILL; another one starts"]


async def test_a_template_that_writes_much_waits_for_nobody_to_read_it(caplog):
    caplog.set_level("INFO", logger="dashinfer.worker")
    with Template(command("wordy")) as template:
        async with ready("good", template=template) as recorder:
            await results(recorder, 1)

    assert "template of ranks: x" in caplog.messages


async def test_where_imports_start_threads_ranks_are_programs(caplog):
    caplog.set_level(logging.INFO, logger="dashinfer.worker")
    with Template(command("threaded,named")) as template:
        for _ in range(2):
            async with ready("good", template=template) as recorder:
                await results(recorder, 1)
                assert templates() == []
    assert sum("are started as programs" in text for text in caplog.messages) == 1


async def test_a_start_that_is_cancelled_leaves_no_template_half_started(children):
    with Template(command("named")) as template:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_steps_with, template)
            while not templates():
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()

        assert children() == templates() == []
        async with ready("good", template=template) as recorder:
            await results(recorder, 1)


async def run_steps_with(template: Template) -> None:
    await run_steps("good", template=template)


async def test_a_template_waits_for_its_children_even_if_whoever_started_the_server_ignores_theirs():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Template(command("named")) as template:
            async with ready("good", template=template) as recorder:
                await results(recorder, 1)
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_what_a_rank_has_started_ends_with_it_when_its_template_is_gone(caplog):
    caplog.set_level("INFO", logger="dashinfer.worker")
    with Template(command("named")) as template, pytest.raises(WorkerError, match="rank 0 ended"):
        async with ready("mother", template=template) as recorder:
            (pid,) = templates()
            os.kill(pid, signal.SIGKILL)
            await results(recorder, 3)
    (child,) = (int(text.rpartition(" ")[2]) for text in caplog.messages if "child" in text)

    assert any_left([child]) == []


async def test_a_rank_that_there_is_no_descriptor_left_for_cannot_be_started(monkeypatch, children):
    receive = processes._receive

    async def truncated(sock):
        data, descriptors = await receive(sock)
        for each in descriptors:
            os.close(each)
        return data, []

    with Template(command("named")) as template:
        monkeypatch.setattr(processes, "_receive", truncated)
        with pytest.raises(StartupError, match="Too many open files"):
            await run_steps("good", template=template)

        assert any_left(children()) == []


async def test_the_end_of_a_template_leaves_the_next_one_alone(monkeypatch):
    monkeypatch.setattr(processes, "FORK_TIMEOUT", 0.5)
    with Template(command("named")) as template, trio.fail_after(20):
        async with ready("good", template=template):
            pass
        os.kill(*templates(), signal.SIGSTOP)

        async def start(again: bool) -> None:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                with pytest.raises(WorkerError, match="the template of ranks"):
                    await template.start(theirs)
                if again:
                    process = await template.start(theirs)
                    process.kill()
                    await process.wait()
                    await process.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start, True)
            await trio.sleep(0.1)
            nursery.start_soon(start, False)
