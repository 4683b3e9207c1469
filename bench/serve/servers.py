"""Servers as processes: starting them for a measurement, timing their start, and reading the memory of a process tree."""

import os
import shlex
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import trio

from dashinfer.bench.client import QUESTION, ask, find_model
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

POLL_SECONDS = 0.1
TERM_SECONDS = 40.0  # longer than servers take to drain


def read_memory(pid: int) -> dict[str, Any] | None:
    """Resident bytes of a process (`parent`) and of each process below it (`workers`, biggest first); None if it is gone."""
    try:
        parent = psutil.Process(pid)
        workers = []
        for child in parent.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it ended between the listing and the reading
                workers.append(child.memory_info().rss)
        return {"parent": parent.memory_info().rss, "workers": sorted(workers, reverse=True)}
    except psutil.NoSuchProcess:
        return None


async def _first_answer(target: Target, process: trio.Process, log: Path, limit: float) -> None:
    """Returns once the server has answered a question. Raises BenchError if it ends before that or takes too long."""
    refusal = "no connection"
    with trio.move_on_after(limit):
        while True:
            if process.poll() is not None:
                raise BenchError(f"{target.label} ended with status {process.returncode} before it answered; see {log}")
            try:
                model = target.model or await find_model(target, limit)
            except BenchError as error:
                refusal = str(error)
            else:
                known = Target(label=target.label, url=target.url, model=model, api_key=target.api_key, body=target.body)
                sample = await ask(known, QUESTION, 1, {}, limit)
                if sample.error is None:
                    return
                refusal = sample.error
            await trio.sleep(POLL_SECONDS)
    raise BenchError(f"{target.label} did not answer within {limit:g} s ({refusal}); see {log}")


@asynccontextmanager
async def running(command: str, target: Target, log: Path, limit: float) -> AsyncIterator[tuple[int, float]]:
    """Starts a server in a session of its own, and ends it, with all its children, on leaving.

    Args:
        command: as one would type it; no shell reads it.
        log: gets what the server prints.
        limit: seconds from the start to the first answer.

    Yields:
        Its process id, and the seconds from the command to its first answer.
    """
    with log.open("wb") as output:
        started = trio.current_time()
        try:
            process = await trio.lowlevel.open_process(
                shlex.split(command), stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise BenchError(f"cannot start {target.label}: {error}") from None
        try:
            await _first_answer(target, process, log, limit)
            yield process.pid, trio.current_time() - started
        finally:
            if process.poll() is None:
                process.terminate()
            with trio.move_on_after(TERM_SECONDS, shield=True):
                await process.wait()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the server left behind; the group outlives its leader
            with trio.CancelScope(shield=True):
                await process.wait()
