"""Servers as processes: a small one, started and ended for real."""

import sys
from pathlib import Path

import psutil
import pytest

from bench.serve.servers import read_memory, running
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

from . import small_server


@pytest.fixture
def target() -> Target:
    return Target(label="small", url=f"http://127.0.0.1:{small_server.free_port()}", model="m")


async def test_a_server_is_started_timed_and_ended_with_its_children(target: Target, tmp_path: Path) -> None:
    port = target.url.rsplit(":", 1)[1]
    async with running(small_server.command(port), target, tmp_path / "log", 60) as (pid, seconds):
        memory = read_memory(pid)
        family = [psutil.Process(pid), *psutil.Process(pid).children()]

    assert 0 < seconds < 60
    assert memory is not None
    assert memory["parent"] > 2**20
    assert len(memory["workers"]) == 1
    assert len(family) == 2
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert read_memory(pid) is None


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{sys.executable} -c 'raise SystemExit(3)'", "ended with status 3 before it answered; see .*log"),
        ("/no/such/command", "cannot start small"),
    ],
)
async def test_a_server_that_does_not_start_is_one_clear_line(
    target: Target, tmp_path: Path, command: str, message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        async with running(command, target, tmp_path / "log", 60):
            raise AssertionError("it runs")
