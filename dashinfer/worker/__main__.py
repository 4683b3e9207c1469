"""A rank: `python -m dashinfer.worker FD`, where FD is its end of the parent's socket pair.

The main thread loads the model and executes plans; one reads frames, and ends the process when the socket closes, in the
middle of a step if need be, so that no rank outlives its parent; one says once a second that the process is alive; with a GPU,
which is given steps before earlier ones have ended, one waits for their results.
Signals that a terminal or a service manager sends to the whole group are left to the parent.
"""

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from dashinfer.errors import StartupError, WorkerError
from dashinfer.types import Alive, Failed, FromParent, FromWorker, Progress, Start, StepPlan
from dashinfer.worker.frames import encode, worker_reader

if TYPE_CHECKING:
    from dashinfer.worker.executor import LaunchedStep

HEARTBEAT_INTERVAL = 1.0  # seconds


class Connection:
    """The rank's end of the wire. Any thread may send; received messages wait in `inbox`."""

    def __init__(self, sock: socket.socket) -> None:
        self.inbox: queue.SimpleQueue[FromParent] = queue.SimpleQueue()
        self._socket = sock
        self._lock = threading.Lock()

    def start(self) -> None:
        for target in (self._read, self._beat):
            threading.Thread(target=target, daemon=True).start()

    def send(self, message: FromWorker) -> None:
        with self._lock:
            try:
                self._socket.sendall(encode(message))
            except OSError:
                os._exit(0)  # the parent is gone

    def _read(self) -> None:
        reader = worker_reader()
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError:
                data = b""
            if not data:
                os._exit(0)
            try:
                for message in reader.feed(data):
                    self.inbox.put(message)
            except WorkerError as error:  # nothing more can be understood, and the main thread would wait for ever
                self.send(Failed("", str(error)))
                os._exit(1)

    def _beat(self) -> None:
        silence = threading.Event()
        while not silence.wait(HEARTBEAT_INTERVAL):
            self.send(Alive())


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(socket.socket(fileno=int(sys.argv[1])))
    connection.start()
    _guarded(connection, partial(serve, connection))


def _guarded(connection: Connection, work: Callable[[], None]) -> None:
    """Do it; whatever it raises is told to the parent and ends the process."""
    try:
        work()
    except BaseException as error:
        kind = type(error).__name__ if isinstance(error, StartupError) else ""
        message = str(error) if kind else f"{type(error).__name__}: {error}"
        connection.send(Failed(kind, message, traceback.format_exc()))
        if not kind:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def serve(connection: Connection) -> None:
    """Load what the parent says, then execute its plans until the process ends."""
    start = connection.inbox.get()
    assert isinstance(start, Start)
    logging.basicConfig(level=start.config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)

    from dashinfer.models.config import ModelConfig

    model_config = ModelConfig.from_hf(start.config.files.config)  # refuses an unknown architecture before torch is imported

    from dashinfer.worker.runner import Runner
    from dashinfer_kernels import pin_threads

    def report(stage: str, done: int, total: int, unit: str) -> None:
        connection.send(Progress(stage, done, total, unit))

    runner = Runner(start.config, model_config, report)
    # What is there now stays: the collector need not look at it again, in the midst of a step.
    gc.collect()
    gc.freeze()
    if not runner.on_gpu:
        pin_threads()
    connection.send(runner.ready)
    rank = start.config.rank
    steps: queue.SimpleQueue[LaunchedStep] = queue.SimpleQueue()
    if runner.on_gpu and rank == 0:
        threading.Thread(target=_guarded, args=(connection, partial(send_results, connection, steps)), daemon=True).start()
    while True:
        plan = connection.inbox.get()
        assert isinstance(plan, StepPlan)
        step = runner.launch(plan)
        if rank != 0:
            continue
        if runner.on_gpu:
            steps.put(step)
        else:
            connection.send(step.result())


def send_results(connection: Connection, steps: "queue.SimpleQueue[LaunchedStep]") -> None:
    """Wait for each step's result and send it, while the main thread queues the steps after it."""
    while True:
        connection.send(steps.get().result())


if __name__ == "__main__":
    main()
