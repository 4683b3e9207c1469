"""The worker processes, seen from the parent: started, watched, and always reaped.

A rank is a process of its own, joined to the parent by a socket pair that it was born with. It ends by itself when its end of
the socket closes, so no signal that ends the parent, SIGKILL included, leaves a rank behind. It is watched three ways: by its
exit, by its heartbeat (a rank that is stopped or stuck says nothing), and by the caller's deadline on each step.

Knows processes and frames; knows nothing of sequences, tensors or HTTP.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import trio

from dashinfer import errors
from dashinfer.types import Alive, Encoded, Failed, FromParent, OutOfMemory, Progress, Ready, Start, StepResult, WorkerConfig
from dashinfer.worker.frames import encode, parent_reader

OnMessage = Callable[[Progress | StepResult | Encoded | OutOfMemory], None]

logger = logging.getLogger("dashinfer.worker")

HEARTBEAT_TIMEOUT = 30.0  # seconds of silence; a rank speaks once a second
HEARTBEAT_GRACE = 3.0  # seconds more: the silence may have been this process's own, stopped by Ctrl-Z or with its machine
EXIT_TIMEOUT = 3.0  # seconds that a rank has to end after its socket closed
LAST_WORDS = 20  # lines of a rank's stderr that an error carries
LONGEST_LINE = 8192  # bytes of a rank's output that are logged at once

# oneDNN, and torch's layer over it, each keep what they prepared for every shape of a product they saw, up to 1,024 of them by
# default. Steps come in many shapes, so that would grow to hundreds of megabytes; the last few dozen steps' are enough.
ENVIRONMENT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}

COMMAND = (sys.executable, "-P", "-m", "dashinfer.worker")


class Rank:
    """One worker process. `run` is its life; the other methods are valid while it runs."""

    def __init__(self, config: WorkerConfig, *, command: Sequence[str] = COMMAND) -> None:
        self._config = config
        self._command = command
        self._name = f"rank {config.rank}"
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._stream: trio.SocketStream | None = None

    async def run(
        self,
        on_message: OnMessage,
        *,
        task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Start the process, report readiness, and pass on its messages until it is cancelled.

        Raises:
            StartupError: the rank could not be started, or could not load; the class that it named.
            WorkerError: it died, fell silent, or sent something that is no frame.
        """
        process = await self._start()
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._log_output, process)
                    nursery.start_soon(self._watch_exit, process)
                    await self.send(Start(self._config))
                    await self._read(on_message, task_status)
        finally:
            with trio.CancelScope(shield=True):
                await self._reap(process)

    async def _start(self) -> trio.Process:
        ours, theirs = socket.socketpair()
        with theirs, ExitStack() as unless_started:
            unless_started.callback(ours.close)
            try:
                process = await trio.lowlevel.open_process(
                    [*self._command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    env={**ENVIRONMENT, **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                raise errors.StartupError(f"the process of {self._name} cannot be started: {error}") from None
            unless_started.pop_all()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        return process

    async def send(self, message: FromParent) -> None:
        """Send one message.

        Raises:
            WorkerError: the rank is gone.
        """
        await self.send_frame(encode(message))

    async def send_frame(self, frame: bytes) -> None:
        assert self._stream is not None
        try:
            await self._stream.send_all(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.sleep(EXIT_TIMEOUT)  # what ended the rank is about to be raised by those who watch it
            raise errors.WorkerError(f"{self._name} closed its connection") from None

    async def _read(self, on_message: OnMessage, task_status: trio.TaskStatus[Ready]) -> None:
        assert self._stream is not None
        reader = parent_reader()
        while True:
            data = await self._receive(HEARTBEAT_TIMEOUT)
            if data is None:
                logger.warning("%s: no sign of life for %.0f s", self._name, HEARTBEAT_TIMEOUT)
                data = await self._receive(HEARTBEAT_GRACE)
            if data is None:
                raise errors.WorkerError(f"{self._name} hangs: no sign of life for {HEARTBEAT_TIMEOUT:.0f} s")
            if not data:
                await trio.sleep(EXIT_TIMEOUT)  # the watcher of the exit has more to say
                raise errors.WorkerError(f"{self._name} closed its connection")
            for message in reader.feed(data):
                match message:
                    case Alive():
                        pass
                    case Ready():
                        task_status.started(message)
                    case Failed():
                        raise self._failure(message)
                    case Progress() | StepResult() | Encoded() | OutOfMemory():
                        on_message(message)

    async def _receive(self, patience: float) -> bytes | None:
        """Some bytes; none at the stream's end; None if there were none for `patience` seconds."""
        assert self._stream is not None
        with trio.move_on_after(patience):
            try:
                return await self._stream.receive_some()
            except trio.BrokenResourceError:
                return b""
        return None

    async def _watch_exit(self, process: trio.Process) -> None:
        status = await process.wait()
        await trio.sleep(0.1)  # let the last lines arrive
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with exit status {status}"
        words = f"; its last words: {' | '.join(self._last_words)}" if self._last_words else ""
        raise errors.WorkerError(f"{self._name} {how}{words}")

    async def _log_output(self, process: trio.Process) -> None:
        """Log what the rank writes, line by line, with its rank."""
        assert process.stdout is not None
        pending = b""
        async for data in process.stdout:
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > LONGEST_LINE:
                lines.append(pending)
                pending = b""
            for line in lines:
                self._log_line(line[:LONGEST_LINE])
        if pending:
            self._log_line(pending)

    def _log_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last_words.append(text)
            logger.info("%s: %s", self._name, text)

    def _failure(self, message: Failed) -> errors.DashInferError:
        if message.traceback:
            logger.debug("%s failed:\n%s", self._name, message.traceback.rstrip())
        kind = getattr(errors, message.kind, None)
        if isinstance(kind, type) and issubclass(kind, errors.StartupError):
            return kind(message.message)
        return errors.WorkerError(f"{self._name}: {message.message}")

    async def _reap(self, process: trio.Process) -> None:
        """Close the socket, which ends a healthy rank, and kill one that does not go."""
        assert self._stream is not None
        await self._stream.aclose()
        with trio.move_on_after(EXIT_TIMEOUT):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


class WorkerGroup:
    """All ranks of one engine. Plans go to every rank, results come from rank 0."""

    def __init__(self, configs: Sequence[WorkerConfig], *, command: Sequence[str] = COMMAND) -> None:
        self._ranks = [Rank(config, command=command) for config in configs]

    async def run(
        self,
        *,
        on_progress: Callable[[Progress], None],
        on_result: Callable[[StepResult], None],
        on_encoded: Callable[[Encoded], None] = lambda message: None,
        on_memory: Callable[[OutOfMemory], None] = lambda message: None,
        task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run all ranks; started, once every one is ready, with what the one with the fewest blocks found: no plan may name a
        block that a rank does not have. The end of any of them ends the group.

        Raises:
            StartupError, WorkerError: as `Rank.run`, of the first rank that failed.
        """

        def from_leader(message: Progress | StepResult | Encoded | OutOfMemory) -> None:
            match message:
                case StepResult():
                    on_result(message)
                case Encoded():
                    on_encoded(message)
                case OutOfMemory():
                    on_memory(message)
                case Progress():
                    on_progress(message)

        def from_follower(message: Progress | StepResult | Encoded | OutOfMemory) -> None:
            if not isinstance(message, Progress):
                raise errors.WorkerError("a rank other than 0 sent a result")

        ready: list[Ready] = []

        async def start(index: int, rank: Rank) -> None:
            ready.append(await nursery.start(rank.run, from_follower if index else from_leader))

        with one_error():
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as starting:
                    for index, rank in enumerate(self._ranks):
                        starting.start_soon(start, index, rank)
                task_status.started(min(ready, key=lambda each: each.num_blocks))

    async def send(self, message: FromParent) -> None:
        """Send a plan, or what goes with plans, encoded once, to every rank."""
        frame = encode(message)
        for rank in self._ranks:
            await rank.send_frame(frame)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"


@contextmanager
def one_error() -> Iterator[None]:
    """Around a nursery: of a group that holds only errors of ours the first leaves, since the others are its consequences."""
    try:
        yield
    except BaseExceptionGroup as group:
        ours, others = group.split(errors.DashInferError)
        if ours is None or others is not None:
            raise
        error: BaseException = ours
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
