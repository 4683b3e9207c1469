"""`Checker`: the process that tries grammars, seen from the server. Blocking, for threads."""

import json
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

from dashinfer.errors import InternalError

COMMAND = (sys.executable, "-P", "-m", "dashinfer.guidance.check")
PATIENCE = 6  # times the timeout, by the clock: the machine may have other things to do


class Checker:
    """Starts `dashinfer.guidance.check` when it is first needed, and again after a grammar that it did not survive. The process
    ends with this object. One grammar at a time."""

    def __init__(self, *, timeout: float) -> None:
        """`timeout` in seconds of the processor's time, for one grammar."""
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stop = weakref.finalize(self, lambda: None)

    def check(self, grammar: str) -> str:
        """The grammar as Lark.

        Raises:
            ValueError: it cannot be used; in one line.
            InternalError: there is no process to try it in.
        """
        with self._lock:
            process = self._start()
            deadline = _Deadline(process, PATIENCE * self._timeout)
            try:
                answer = _ask(process, grammar)
            finally:
                late = deadline.end()
            if late or not answer:
                process.kill()
                late = process.wait() == -signal.SIGPROF or late
                self.close()
        if answer:
            found = json.loads(answer)
            if "error" in found:
                raise ValueError(found["error"])
            return found["grammar"]
        if late:
            raise ValueError(f"it is too complex: it takes longer than {self._timeout:g} s to compile")
        raise ValueError("it is too complex: nested too deeply, or too large")

    def close(self) -> None:
        """End the process."""
        self._stop()
        self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            try:
                self._process = subprocess.Popen([*COMMAND, str(self._timeout)], text=True, encoding="utf-8", **pipes)
            except OSError as error:
                raise InternalError(f"grammars cannot be checked: {error}") from None
            self._stop = weakref.finalize(self, _end, self._process)
        return self._process


class _Deadline:
    """Kills a process after so many seconds, but never once it has ended: the process has the next grammar then."""

    def __init__(self, process: "subprocess.Popen[str]", seconds: float) -> None:
        self._process = process
        self._lock = threading.Lock()
        self._ended = self._passed = False
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.start()

    def _pass(self) -> None:
        with self._lock:
            if not self._ended:
                self._passed = True
                self._process.kill()

    def end(self) -> bool:
        """Whether it had passed, and the process is killed."""
        self._timer.cancel()
        with self._lock:
            self._ended = True
            return self._passed


def _ask(process: "subprocess.Popen[str]", grammar: str) -> str:
    """Its answer; nothing if it died over it."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(grammar) + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except OSError:
        return ""


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):  # of what was not written when it died
            pipe.close()
