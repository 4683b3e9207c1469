"""The worker processes, seen from the parent: started, watched, and always reaped.

A rank is a process of its own, joined to the parent by a socket pair that it was born with. It ends by itself when its end of
the socket closes, so no signal that ends the parent, SIGKILL included, leaves a rank behind. Each is in a process group of its
own: when the parent ends, a template kills the ranks that it forked (see `processes`); the groups of others are orphaned, and
the kernel wakes those of them that are stopped. (Not where the process that inherits orphans is in the same session, as in a
container whose first process is the shell that started the server.)

A rank is watched three ways: by its exit, by its heartbeat (a rank that is stopped or stuck says nothing), and by the caller's
deadline on each step. The end of one is the end of its group: the others, which wait for it in the midst of a step, are killed
at once, and all are reaped before the error leaves, so that memory, cores and ports are free for the next group.

Knows processes and frames; knows nothing of sequences, tensors or HTTP.
"""

import logging
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from dashinfer import errors
from dashinfer.types import (
    Alive,
    Encoded,
    Failed,
    FromParent,
    Masks,
    OutOfMemory,
    Progress,
    Ready,
    Start,
    StepResult,
    WorkerConfig,
)
from dashinfer.worker.frames import encode, parent_reader
from dashinfer.worker.processes import COMMAND, LAST_WORDS, LAST_WORDS_TIMEOUT, Process, Template, describe_exit, spawn

Spoken = Progress | StepResult | OutOfMemory | Encoded
OnMessage = Callable[[Spoken], None]

logger = logging.getLogger("dashinfer.worker")

HEARTBEAT_TIMEOUT = 10.0  # seconds of silence; a rank speaks once a second
LOADING_SILENCE = 30.0  # seconds at least, until a rank is ready: imports and compilers hold its interpreter
HEARTBEAT_GRACE = 3.0  # seconds more: the silence may have been this process's own, stopped by Ctrl-Z or with its machine
EXIT_TIMEOUT = 3.0  # seconds that a rank has to end after its socket closed
CAUSE_TIMEOUT = 1.0  # seconds that the cause has to be noticed after what it led to
LONGEST_LINE = 8192  # bytes of a rank's output that are logged at once


class Disconnected(errors.WorkerError):
    """A rank's connection closed, and nothing said why."""


class AnyRank(Protocol):
    """A rank as its group sees it, wherever its process is."""

    async def run(self, on_message: OnMessage, *, task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED) -> None:
        """One life; see `Rank.run`. Whatever ends it, the process has ended when it returns."""
        ...

    async def send_frame(self, frame: bytes) -> None:
        """Send a whole frame; see `Rank.send_frame`."""
        ...

    def kill(self) -> None:
        """End the process without asking it; `run` ends then."""
        ...


class Rank:
    """One worker process. `run` is its life; the other methods are valid while it runs."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        command: Sequence[str] = COMMAND,
        template: Template | None = None,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            template: starts the process, rather than `command`.
            heartbeat_timeout: seconds of silence after which a rank that was ready hangs.
            on_line: is told each line that the rank writes, besides the log.
        """
        self._config = config
        self._start_process = partial(spawn, command) if template is None else template.start
        self._on_line = on_line
        self._heartbeat_timeout = heartbeat_timeout
        self._name = f"rank {config.rank}"
        self._last_words: deque[str] = deque(maxlen=LAST_WORDS)
        self._stream: trio.SocketStream | None = None
        self._process: Process | None = None
        self._killed = False
        self._said_all = trio.Event()  # its socket has ended
        self._wrote_all = trio.Event()  # its output has

    async def run(
        self,
        on_message: OnMessage,
        *,
        task_status: trio.TaskStatus[Ready] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Start the process, report readiness, and pass on its messages until it is cancelled.

        Cancelled, it gives the process EXIT_TIMEOUT seconds to end; on an error it kills it.

        Raises:
            StartupError: the rank could not be started, or could not load; the class that it named.
            PeerLost: it could not reach another rank.
            WorkerError: it died, fell silent, or sent something that is no frame.
        """
        process = await self._start()
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._log_output, process)
                    nursery.start_soon(self._watch_exit, process)
                    nursery.start_soon(self._read, on_message, task_status)
                    await self.send_frame(encode(Start(self._config)))
        except Exception:
            self.kill()
            raise
        finally:
            with trio.CancelScope(shield=True):
                await self._reap(process)

    async def _start(self) -> Process:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise self._not_started(error) from None
        with theirs, ExitStack() as unless_started:
            unless_started.callback(ours.close)
            try:
                self._process = await self._start_process(theirs)
            except OSError as error:
                raise self._not_started(error) from None
            unless_started.pop_all()
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        return self._process

    def _not_started(self, error: OSError) -> errors.StartupError:
        return errors.StartupError(f"the process of {self._name} cannot be started: {error}")

    async def send_frame(self, frame: bytes) -> None:
        """Send a whole frame. One for a rank that is gone is dropped, since `run` is about to say what ended it; one that a
        stopped rank does not take waits until its silence ends it."""
        assert self._stream is not None
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(frame)

    def kill(self) -> None:
        """End the process, and what it started, without asking it; `run` reaps it."""
        self._killed = True
        if self._process is not None:
            self._process.kill()

    async def _read(self, on_message: OnMessage, task_status: trio.TaskStatus[Ready]) -> None:
        reader = parent_reader()
        patience = max(self._heartbeat_timeout, LOADING_SILENCE)
        while True:
            data = await self._receive(patience)
            if data is None:
                logger.warning("%s: no sign of life for %g s", self._name, patience)
                data = await self._receive(HEARTBEAT_GRACE)
            if data is None:
                raise errors.WorkerError(f"{self._name} hangs: no sign of life for {patience:g} s{self._words()}")
            if not data:
                self._said_all.set()
                await trio.sleep(EXIT_TIMEOUT)  # the watcher of the exit has more to say
                raise Disconnected(f"{self._name} closed its connection{self._words()}")
            for message in reader.feed(data):
                match message:
                    case Alive():
                        pass
                    case Ready():
                        patience = self._heartbeat_timeout
                        task_status.started(message)
                    case Failed():
                        raise self._failure(message)
                    case Progress() | StepResult() | OutOfMemory() | Encoded():
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

    async def _watch_exit(self, process: Process) -> None:
        status = await process.wait()
        with trio.move_on_after(LAST_WORDS_TIMEOUT):
            await self._said_all.wait()  # it may have said itself what was wrong
            await self._wrote_all.wait()
        raise errors.WorkerError(f"{self._name} {describe_exit(status)}{self._words()}")

    async def _log_output(self, process: Process) -> None:
        """Log what the rank writes, line by line, with its rank."""
        pending = b""
        async for data in process.output:
            *lines, pending = (pending + data).split(b"\n")
            if len(pending) > LONGEST_LINE:
                lines.append(pending)
                pending = b""
            for line in lines:
                self._log_line(line[:LONGEST_LINE])
        if pending:
            self._log_line(pending)
        self._wrote_all.set()

    def _log_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last_words.append(text)
            logger.info("%s: %s", self._name, text)
            self._on_line(text)

    def _words(self) -> str:
        return f"; its last words: {' | '.join(self._last_words)}" if self._last_words else ""

    def _failure(self, message: Failed) -> errors.DashInferError:
        if message.traceback:
            logger.debug("%s failed:\n%s", self._name, message.traceback.rstrip())
        kind = getattr(errors, message.kind, None)
        if isinstance(kind, type) and issubclass(kind, errors.StartupError):
            return kind(message.message)
        lost = message.kind == errors.PeerLost.__name__
        return (errors.PeerLost if lost else errors.WorkerError)(f"{self._name}: {message.message}")

    async def _reap(self, process: Process) -> None:
        """Close the socket, which ends a healthy rank, and kill one that does not go."""
        assert self._stream is not None
        await self._stream.aclose()
        if not self._killed:
            with trio.move_on_after(EXIT_TIMEOUT):
                await process.wait()
        self.kill()  # no more than a note if it has ended; and if it was to be killed before it had started, it is now
        await process.wait()
        await process.aclose()


class WorkerGroup:
    """All ranks of one model. `run` is its one life; to start again, another group is made.

    Plans go to every rank, masks to the first rank of the last stage, which samples; results come from there, everything else
    from rank 0.
    """

    def __init__(
        self,
        configs: Sequence[WorkerConfig],
        *,
        command: Sequence[str] = COMMAND,
        template: Template | None = None,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
        make_rank: Callable[[WorkerConfig], AnyRank] | None = None,
    ) -> None:
        """
        Args:
            configs: of each rank, in order. Several that name no `rendezvous` meet in a file.
            command: starts a rank, given the number of its end of a socket.
            template: starts ranks, rather than `command`.
            heartbeat_timeout: seconds of silence after which a rank that was ready hangs.
            make_rank: makes each rank in place of `Rank`, which the other arguments are for.
        """
        assert [config.rank for config in configs] == list(range(len(configs)))
        self._configs = configs
        self._make_rank = make_rank or partial(Rank, command=command, template=template, heartbeat_timeout=heartbeat_timeout)
        self._ranks: list[AnyRank] = []
        self._sampler = len(configs) - len(configs) // configs[0].pipeline_parallel  # the first rank of the last stage
        self._failures: list[errors.DashInferError] = []  # as they were noticed
        self._failed = trio.Event()  # there are enough of them

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
        block that a rank does not have. The failure of any of them ends the group; whatever ends it, every process has ended.

        Raises:
            StartupError, WorkerError: as `Rank.run`; of several failures the one that most likely led to the others.
        """
        assert not self._ranks, "a group has one life"

        def on_message(rank: int, message: Spoken) -> None:
            match message:
                case StepResult() if rank == self._sampler:
                    on_result(message)
                case Encoded() if rank == 0:
                    on_encoded(message)
                case OutOfMemory() if rank == 0:
                    on_memory(message)
                case Progress():
                    if rank == 0:
                        on_progress(message)
                case _:
                    raise errors.WorkerError(f"rank {rank} sent a {type(message).__name__}, which is not for it to send")

        ready: dict[int, Ready] = {}

        async def start(rank: int) -> None:
            ready[rank] = await nursery.start(self._live, rank, partial(on_message, rank))

        async def start_all() -> None:
            async with trio.open_nursery() as starting:
                for rank in range(len(self._ranks)):
                    starting.start_soon(start, rank)
            task_status.started(min((ready[rank] for rank in sorted(ready)), key=lambda each: each.num_blocks))

        with _meeting(self._configs) as configs:
            self._ranks = [self._make_rank(config) for config in configs]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(start_all)
                await self._until_failed()
                for each in self._ranks:
                    each.kill()
                nursery.cancel_scope.cancel()
        raise min(self._failures, key=_distance)

    async def _live(self, rank: int, on_message: OnMessage, *, task_status: trio.TaskStatus[Ready]) -> None:
        try:
            await self._ranks[rank].run(on_message, task_status=task_status)
        except errors.DashInferError as error:
            self._failures.append(error)
            self._failed.set()
            await trio.sleep_forever()  # until the whole group is ended

    async def _until_failed(self) -> None:
        """Until a rank has failed and it is known why, or cannot be expected to be."""
        await self._failed.wait()
        with trio.move_on_after(CAUSE_TIMEOUT):
            while len(self._failures) < len(self._ranks) and all(map(_distance, self._failures)):
                self._failed = trio.Event()
                await self._failed.wait()

    async def send(self, message: FromParent) -> None:
        """Send a plan, or what goes with plans, encoded once, to every rank; masks to the one that samples. One that is stopped
        keeps nothing from the others; its silence ends the group, and with it the waiting."""
        frame = encode(message)
        ranks = [self._ranks[self._sampler]] if isinstance(message, Masks) else self._ranks
        if len(ranks) == 1:
            await ranks[0].send_frame(frame)
            return
        async with trio.open_nursery() as nursery:
            for rank in ranks:
                nursery.start_soon(rank.send_frame, frame)


@contextmanager
def _meeting(configs: Sequence[WorkerConfig]) -> Iterator[Sequence[WorkerConfig]]:
    """The configurations with a place to meet where they need one, a file in a directory of our own."""
    if len(configs) == 1 or configs[0].rendezvous:
        yield configs
        return
    with tempfile.TemporaryDirectory(prefix="dashinfer-", ignore_cleanup_errors=True) as directory:
        place = (Path(directory) / "rendezvous").as_uri()
        yield [msgspec.structs.replace(config, rendezvous=place) for config in configs]


def _distance(error: errors.DashInferError) -> int:
    """How far an error is from what caused it."""
    match error:
        case Disconnected():
            return 2
        case errors.PeerLost():
            return 1
        case _:
            return 0


@contextmanager
def one_error() -> Iterator[None]:
    """Around a nursery: of a group that holds only errors of ours one leaves, since the others are its consequences."""
    try:
        yield
    except BaseExceptionGroup as group:
        ours, others = group.split(errors.DashInferError)
        if ours is None or others is not None:
            raise
        raise min(_flat(ours), key=_distance) from None


def _flat(group: BaseExceptionGroup[errors.DashInferError]) -> Iterator[errors.DashInferError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _flat(error)
        else:
            yield error
