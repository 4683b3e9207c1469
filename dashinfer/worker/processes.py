"""Starting the processes of ranks: each as a program of its own, or, quicker, as a fork of a template.

A template has imported torch and our own code once; a rank that it forks starts to load at once, and shares the memory of what
was imported with the template and the other ranks. The template is started at the first need, and again if it has ended, which
ranks outlive; it lives as long as somebody is in its `with` block, and no longer than this process. Where forks are not safe,
ranks are started as programs.

Knows processes and descriptors; knows nothing of what ranks are told.
"""

import errno
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Protocol, Self

import trio

from dashinfer import errors
from dashinfer.worker.template import ALIVE, NUMBER

logger = logging.getLogger("dashinfer.worker")

LOADING_SILENCE = 33.0  # seconds without a sign of life from a template that imports; it gives one a second where it can
DYING = 0.1  # seconds from the end of a process's sockets to its own
FORK_TIMEOUT = 3.0  # seconds for a template to fork a rank
STATUS_TIMEOUT = 1.0  # seconds for a template to tell the status of a rank that has ended
LAST_WORDS = 20  # lines of a process's output that an error carries
LAST_WORDS_TIMEOUT = 0.5  # seconds that they have to arrive: its children may hold its pipe open
MOST_SAID = 1 << 16  # bytes of a template's output that are kept, the last ones

# oneDNN, and torch's layer over it, each keep what they prepared for every shape of a product they saw, up to 1,024 of them by
# default. Steps come in many shapes, so that would grow to hundreds of megabytes; the last few dozen steps' are enough.
ENVIRONMENT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}

COMMAND = (sys.executable, "-P", "-m", "dashinfer.worker")  # and a descriptor's number; a template's with `--template` before


class Process(Protocol):
    """A rank's process, leader of a process group.

    Attributes:
        pid: its number, or what it was.
        output: what it writes.
    """

    pid: int
    output: trio.abc.ReceiveStream

    async def wait(self) -> int | None:
        """Until it has ended, and what it started has been killed. Returns its exit status, the negative number of the signal
        that ended it, or None if nobody knows."""
        ...

    def kill(self) -> None:
        """End its group."""
        ...

    async def aclose(self) -> None:
        """Close what is open of a process that has ended."""
        ...


class Spawned:
    """A program that this process has started."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdout is not None
        self.pid = process.pid
        self.output: trio.abc.ReceiveStream = process.stdout
        self._process = process
        self._ended = False

    async def wait(self) -> int:
        """See `Process.wait`."""
        status = await self._process.wait()
        self.kill()  # what it has started: while one of them lives, its number is no other group's
        self._ended = True
        return status

    def kill(self) -> None:
        """See `Process.kill`."""
        if not self._ended:
            with suppress(ProcessLookupError, PermissionError):  # it has ended just now
                os.killpg(self.pid, signal.SIGKILL)

    async def aclose(self) -> None:
        """See `Process.aclose`."""
        await self.output.aclose()


async def spawn(command: Sequence[str], connection: socket.socket) -> Spawned:
    """Start a rank. Raises OSError."""
    process = await trio.lowlevel.open_process(
        [*command, str(connection.fileno())],
        pass_fds=[connection.fileno()],
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    return Spawned(process)


class Forked:
    """A rank that a template has forked, and watches."""

    def __init__(self, pid: int, process: int, report: socket.socket, output: trio.abc.ReceiveStream) -> None:
        """`process`: a descriptor of it, for `poll`. `report`: from the template, which tells its status."""
        self.pid = pid
        self.output = output
        self._process = process
        self._report = report
        self._ended = False
        self._status: int | None = None

    async def wait(self) -> int | None:
        """See `Process.wait`."""
        if not self._ended:
            await trio.lowlevel.wait_readable(self._process)
            with trio.move_on_after(STATUS_TIMEOUT):
                data, _ = await _receive(self._report)
                self._status = NUMBER.unpack(data)[0] if data else None
            if self._status is None:  # the template, which ends what it has started, is gone or stopped
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._ended = True
        return self._status

    def kill(self) -> None:
        """See `Process.kill`."""
        if not self._ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)  # fails where its number may be another's by now
                os.killpg(self.pid, signal.SIGKILL)

    async def aclose(self) -> None:
        """See `Process.aclose`."""
        os.close(self._process)
        self._report.close()
        await self.output.aclose()


class Template:
    """Starts ranks as forks of a template, or as programs where that cannot be. Any number of `with` blocks may hold it."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._forks = _can_fork()
        self._users = 0
        self._starting = trio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None  # to it
        self._output: io.FileIO | None = None  # what it writes
        self._said = b""  # what was read there and not logged yet

    def __enter__(self) -> Self:
        self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            self._end()

    async def start(self, connection: socket.socket) -> Process:
        """Start a rank, with its end of a connection.

        Raises:
            OSError: it cannot be started.
            WorkerError: the template has ended, or hangs; another one starts next time.
        """
        assert self._users, "used in a `with` block"
        async with self._starting:
            if self._process is not None and self._process.poll() is not None:
                logger.warning("the template of ranks %s; another one starts", self._trouble())
                self._end()
            if self._forks and self._process is None:
                await self._start()
        return await (self._fork(connection) if self._forks else spawn(self._command, connection))

    async def _start(self) -> None:
        """Until it can fork, or says that it cannot."""
        with ExitStack() as unless_started:
            unless_started.callback(self._end)
            self._socket, theirs = _sockets()
            reading, writing = _pipe()
            os.set_blocking(reading, False)
            self._output = io.FileIO(reading)
            with theirs, writing:
                # in a thread, as trio does it
                self._process = await trio.to_thread.run_sync(
                    partial(
                        subprocess.Popen,
                        [*self._command, "--template", str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        env=_environment(),
                        stdin=subprocess.DEVNULL,
                        stdout=writing,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                    )
                )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_all, self._output)
                answer = await self._until_ready()
                nursery.cancel_scope.deadline = trio.current_time() + (LAST_WORDS_TIMEOUT if answer is None else 0)
            if answer is None:
                raise errors.WorkerError(f"the template of ranks {self._trouble()}")
            self._log_output()
            self._forks = answer
            if self._forks:
                unless_started.pop_all()
            else:
                logger.info("ranks are started as programs, since what they import starts threads, which a fork would lack")

    async def _read_all(self, output: io.FileIO) -> None:
        """Until the end of what a template writes. One that imports may write more than a pipe holds."""
        while True:
            await trio.lowlevel.wait_readable(output)
            if not self._read(output):
                return

    def _read(self, output: io.FileIO) -> bool:
        """What is there. False at the end."""
        while data := output.read(MOST_SAID):
            self._said = (self._said + data)[-MOST_SAID:]
        return data is None

    def _log_output(self) -> list[str]:
        """Log what the template has written since the last time. Returns its lines."""
        assert self._output is not None
        self._read(self._output)
        lines, self._said = self._said.decode(errors="replace").splitlines(), b""
        for line in lines:
            logger.info("template of ranks: %s", line)
        return lines

    async def _until_ready(self) -> bool | None:
        """Whether the template can fork; None if it has ended or hangs."""
        assert self._socket is not None
        while True:
            answer = b""
            with trio.move_on_after(LOADING_SILENCE):
                answer, _ = await _receive(self._socket)
            if not answer:
                return None
            (number,) = NUMBER.unpack(answer)
            if number != ALIVE:
                return bool(number)

    def _trouble(self) -> str:
        """What is wrong with a template that has ended or says nothing, and its last words."""
        assert self._process is not None
        trouble = "hangs"
        with suppress(subprocess.TimeoutExpired):
            trouble = describe_exit(self._process.wait(DYING))
        lines = self._log_output()
        return f"{trouble}; its last words: {' | '.join(lines[-LAST_WORDS:])}" if lines else trouble

    async def _fork(self, connection: socket.socket) -> Forked:
        assert self._socket is not None
        template = self._process
        with ExitStack() as unless_forked:
            report, theirs = _sockets()
            unless_forked.enter_context(report)
            reading, writing = _pipe()
            unless_forked.callback(os.close, reading)
            with theirs, writing:
                descriptors = [connection.fileno(), writing.fileno(), theirs.fileno()]
                with suppress(BrokenPipeError, ConnectionResetError):  # it has ended just now, and so does the report
                    socket.send_fds(self._socket, [b"\0"], descriptors)
            answer = b""
            with trio.move_on_after(FORK_TIMEOUT, shield=True):  # a rank that is there is ended as one
                answer, received = await _receive(report)
            if not answer:
                trouble = "is gone"
                if self._process is template:  # nobody else has noticed, and begun another one
                    trouble = self._trouble()
                    self._end()
                raise errors.WorkerError(f"the template of ranks {trouble}")
            (pid,) = NUMBER.unpack(answer)
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
            if not received:  # there was no room for the descriptor; the end of the report ends the rank
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            unless_forked.pop_all()
        return Forked(pid, received[0], report, trio.lowlevel.FdStream(reading))

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._output is not None:
            self._log_output()
            self._output.close()
        if self._socket is not None:
            self._socket.close()
        self._process = self._output = self._socket = None


def _can_fork() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
        os.stat("/proc/self/task")
    except (AttributeError, OSError):
        return False
    return sys.platform == "linux"


def _environment() -> dict[str, str]:
    return {**ENVIRONMENT, **os.environ}


def _sockets() -> tuple[socket.socket, socket.socket]:
    """Ours, and a template's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def _pipe() -> tuple[int, io.FileIO]:
    """For a process's output: where it is read, and where it is written."""
    reading, writing = os.pipe()
    return reading, io.FileIO(writing, "w")


async def _receive(sock: socket.socket) -> tuple[bytes, list[int]]:
    """A message and the descriptors in it; an empty one at the end."""
    await trio.lowlevel.wait_readable(sock)
    try:
        data, descriptors, _, _ = socket.recv_fds(sock, NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return b"", []
    return data, descriptors


def describe_exit(status: int | None) -> str:
    """What a process did that has a status, see `Process.wait`."""
    if status is None:
        return "ended"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # most real-time signals have no name
        name = f"signal {-status}"
    return f"was killed by {name}"
