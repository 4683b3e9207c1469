"""The processes below one, as Linux's /proc shows them."""

import os
import signal
import time
from pathlib import Path


def children_of(pid: int | str) -> list[int]:
    """Process ids of a process's children; none if it has just ended. `self` is this process."""
    try:
        return [int(child) for each in Path(f"/proc/{pid}/task").iterdir() for child in (each / "children").read_text().split()]
    except FileNotFoundError:
        return []


def templates_of(pid: int | str) -> list[int]:
    """Process ids of a process's templates of workers."""
    return [child for child in children_of(pid) if b"--template" in _command_of(child).split(b"\0")]


def workers_of(pid: int | str) -> list[int]:
    """Process ids of what the templates of a process have forked."""
    return sorted(worker for template in templates_of(pid) for worker in children_of(template))


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def is_alive(pid: int) -> bool:
    try:
        return _state_of(Path(f"/proc/{pid}/stat")) != "Z"
    except FileNotFoundError:
        return False


def stop_all_threads(pid: int) -> None:
    """Stop a process, and wait until it has stopped: for Linux it has when its last thread has."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while any(_state_of(each / "stat") != "T" for each in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.001)


def any_left(pids: list[int]) -> list[int]:
    """Those that are alive after two seconds, and are killed then."""
    deadline = time.monotonic() + 2
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def _state_of(stat: Path) -> str:
    return stat.read_text().rsplit(")", 1)[1].split()[0]
