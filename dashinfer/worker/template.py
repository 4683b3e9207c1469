"""The template of ranks: a process that has imported what they import, and forks one whenever its parent asks for it.

Over its socket it says that it is alive until it says whether it can fork. Then come the descriptors of each rank to be: its
connection, its output, and its *report*, a socket that is told the rank's process id together with a descriptor of the process
(`pidfd_open`), or the negative `errno` of what failed, and at last its exit status. The parent closes a report to have the rank
killed; the end of the parent kills all of them, stopped ones too. What a rank has started ends with it, if it stayed in its
process group.

A fork has one thread, so the template must have no other, but for those that end before a fork, as NumPy's OpenBLAS has them,
and must not have initialised CUDA. Linux only.
"""

import errno
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

NUMBER = struct.Struct("<i")
ALIVE = -1  # in place of whether it can fork
HEARTBEAT_INTERVAL = 1.0  # seconds
_DESCRIPTORS = 3  # of a rank to be
_END_OF_THREADS = 0.5  # seconds that threads which have been joined take to be gone, at most


@dataclass(frozen=True)
class _Rank:
    pid: int
    process: int  # can be read when it has ended
    report: socket.socket

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # which is nobody else's number before `reap`

    def reap(self) -> None:
        self.kill()  # what it has started
        _, status = os.waitpid(self.pid, 0)
        with suppress(OSError):
            self.report.send(NUMBER.pack(os.waitstatus_to_exitcode(status)))
        self.close()

    def close(self) -> None:
        self.report.close()
        os.close(self.process)


@contextmanager
def beating(parent: socket.socket) -> Iterator[None]:
    """Tell the parent that this process is alive, from a thread that ends on leaving; or end the process with the parent."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_INTERVAL):
            try:
                parent.send(NUMBER.pack(ALIVE))
            except OSError:
                os._exit(0)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    yield
    ended.set()
    thread.join()


def serve(parent: socket.socket) -> int:
    """Fork ranks until the parent ends.

    Args:
        parent: of type SOCK_SEQPACKET.

    Returns:
        In each rank, the descriptor of its connection; in the template, never.
    """
    return _Template(parent).serve()


class _Template:
    def __init__(self, parent: socket.socket) -> None:
        self._parent = parent
        self._ranks: dict[int, _Rank] = {}  # by what can be polled of them
        self._poll = select.poll()
        self._poll.register(parent, select.POLLIN)

    def serve(self) -> int:
        for each in (1, 2):
            os.set_blocking(each, False)  # what it writes is read when it has ended, or asked for in vain; more is lost
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if whoever started the server ignores it, nothing could be waited for
        try:
            self._parent.send(NUMBER.pack(_is_alone_after_fork()))
        except OSError:
            os._exit(0)
        while True:
            descriptor, _ = self._poll.poll()[0]  # one at a time: the next may take the numbers that this one gives back
            if descriptor == self._parent.fileno():
                connection = self._answer()
                if connection is not None:
                    return connection
                continue
            rank = self._ranks[descriptor]
            self._forget(descriptor)
            if descriptor == rank.process:
                self._forget(rank.report.fileno())
                rank.reap()
            else:
                rank.kill()

    def _answer(self) -> int | None:
        """Do what the parent asks. In a rank, see `serve`; None in the template."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._parent, 1, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            data, descriptors = b"", []
        if not data:
            for rank in self._ranks.values():
                rank.kill()
            os._exit(0)
        if len(descriptors) < _DESCRIPTORS:  # there was no room for all; whoever waits for the others sees them closed
            for each in descriptors:
                os.close(each)
            return None
        connection, output, descriptor = descriptors
        report = socket.socket(fileno=descriptor)
        try:
            pid = os.fork()
        except OSError as error:
            pid = -(error.errno or errno.EAGAIN)
        if pid == 0:
            report.close()
            self._become_rank(output)
            return connection
        os.close(connection)
        os.close(output)
        if pid > 0:
            self._begin(pid, report)
        else:
            with report, suppress(OSError):
                report.send(NUMBER.pack(pid))
        return None

    def _begin(self, pid: int, report: socket.socket) -> None:
        """Watch a rank that has just been forked, and tell of it."""
        with suppress(OSError):
            os.setpgid(pid, pid)  # which it does, too, but perhaps later than it is killed
        rank = _Rank(pid, os.pidfd_open(pid), report)
        try:
            socket.send_fds(report, [NUMBER.pack(pid)], [rank.process])
        except OSError:  # nobody waits for it any more
            rank.kill()
            rank.reap()
            return
        for descriptor, events in ((rank.process, select.POLLIN), (report.fileno(), 0)):
            self._ranks[descriptor] = rank
            self._poll.register(descriptor, events)

    def _become_rank(self, output: int) -> None:
        os.setpgid(0, 0)
        self._parent.close()
        for rank in set(self._ranks.values()):
            rank.close()
        _write_to(output)
        os.close(output)

    def _forget(self, descriptor: int) -> None:
        """It is not polled any more."""
        if self._ranks.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)


def _write_to(descriptor: int) -> None:
    """What goes to standard output and standard error goes there."""
    for each in (1, 2):
        os.dup2(descriptor, each)


def _is_alone_after_fork() -> bool:
    """Whether this process has one thread once it has forked, before which some libraries end theirs."""
    try:
        pid = os.fork()
    except OSError:
        return False
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + _END_OF_THREADS
    while len(os.listdir("/proc/self/task")) > 1:
        if time.monotonic() > deadline:
            return False
        time.sleep(1e-3)
    return True
