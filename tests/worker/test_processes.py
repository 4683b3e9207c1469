"""Templates against real processes whose model is fake. What holds for ranks however they start is in `test_supervisor`."""

import json
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from dashinfer.errors import WorkerError
from dashinfer.worker import processes
from dashinfer.worker.processes import Template
from dashinfer.worker.supervisor import one_error

from .test_supervisor import (
    Recorder,
    all_children,
    any_left,
    children_of,
    command,
    group,
    is_alive,
    pids,
    plans,
    run_steps,
    templates,
)


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


async def test_groups_have_one_template_which_ends_with_its_last_user_and_leaves_nothing():
    files = len(os.listdir("/proc/self/fd"))
    with Template(command("named")) as template:
        seen = set()
        with template:
            for _ in range(2):
                async with ready("good", 2, template=template) as recorder:
                    assert sorted(pids(recorder.group)) == all_children()
                    seen |= {*templates()}
        (pid,) = seen
        assert is_alive(pid)
        files_of_template = len(os.listdir(f"/proc/{pid}/fd"))
        async with ready("good", 2, template=template):
            pass
        assert len(os.listdir(f"/proc/{pid}/fd")) == files_of_template

    assert pid not in children_of("self")
    assert all_children() == []
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
async def test_a_template_that_does_not_come_about_is_told_of(mode, trouble, monkeypatch):
    monkeypatch.setattr(processes, "LOADING_SILENCE", 2.0)
    with (
        trio.fail_after(30),
        Template(command(mode)) as template,
        pytest.raises(WorkerError, match=f"the template of ranks {trouble}"),
    ):
        await run_steps("good", template=template)

    assert all_children() == []


async def test_where_imports_start_threads_ranks_are_programs(caplog):
    caplog.set_level(logging.INFO, logger="dashinfer.worker")
    with Template(command("threaded,named")) as template:
        for _ in range(2):
            async with ready("good", template=template) as recorder:
                await results(recorder, 1)
                assert templates() == []
    assert sum("are started as programs" in text for text in caplog.messages) == 1


async def test_a_start_that_is_cancelled_leaves_no_template_half_started():
    with Template(command("named")) as template:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_steps_with, template)
            while not templates():
                await trio.sleep(0.001)
            nursery.cancel_scope.cancel()

        assert all_children() == templates() == []
        async with ready("good", template=template) as recorder:
            await results(recorder, 1)


async def run_steps_with(template: Template) -> None:
    await run_steps("good", template=template)
