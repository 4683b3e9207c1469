"""No rank outlives whoever started it, however that ends."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.process_tree import any_left, stop_all_threads

from .ranks import FAKE_WORKER, all_children, command

PR_SET_CHILD_SUBREAPER = 36


@pytest.mark.parametrize("new_session", [False, True])
@pytest.mark.parametrize(("mode", "stop"), [("good", False), ("loading", False), ("good", True), ("loading,good", True)])
def test_no_rank_outlives_a_killed_parent(mode, stop, new_session, tmp_path):
    assert_ranks_end(group_program(repr(mode)), stop, tmp_path, new_session)


@pytest.mark.parametrize("stop", [False, True])
def test_no_rank_outlives_a_killed_parent_with_its_template(stop, tmp_path):
    """Stopped ones in particular, whoever inherits them."""
    program = group_program(f"'good', template=Template({command('named')}).__enter__()")
    assert_ranks_end(program, stop, tmp_path, reap=False)


def group_program(arguments: str) -> str:
    """A program that starts three ranks and prints their process ids after its own."""
    return f"""
import sys, trio
sys.path[:0] = {[str(FAKE_WORKER.parents[2])]!r}
import os
from dashinfer.worker.processes import Template
from tests.worker.ranks import Recorder, all_children, group, templates
async def main():
    async with trio.open_nursery() as nursery:
        recorder = Recorder(group({arguments}, size=3))
        nursery.start_soon(recorder.start, nursery)
        while not recorder.progress or len(all_children()) < 3:
            await trio.sleep(0.01)
        print(os.getpid(), *all_children(), *templates(), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def assert_ranks_end(program: str, stop: bool, directory: Path, new_session: bool = False, reap: bool = True) -> None:
    """Kill the program, with one of its ranks stopped.

    Args:
        new_session: it leads one.
        reap: its ranks are inherited by a process that is in another session.
    """
    with running(program, new_session, directory) as process, inheriting(reap and not new_session):
        pid, *ranks = (int(pid) for pid in process.stdout.readline().split())
        if stop:
            stop_all_threads(ranks[1])
        os.kill(pid, signal.SIGKILL)
        assert len(ranks) >= 3
        assert any_left(ranks) == []


@contextmanager
def inheriting(active: bool) -> Iterator[None]:
    """Processes below this one become its children when their parents end."""
    if not active:
        yield
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    before = set(all_children())
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        assert prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) == 0
        for pid in set(all_children()) - before:
            os.waitpid(pid, 0)


@contextmanager
def running(program: str, new_session: bool, directory: Path):
    """A Python process with its output as a pipe, and what it leaves behind in a directory. It leads a new session, or is in
    one that a shell leads."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command if new_session else ["sh", "-c", '"$@"; exit', "sh", *command],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(directory)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()
