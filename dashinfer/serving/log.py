"""Logging: one format on standard error for everything this process says, one line a request, one line for an error.

Knows levels and line formats; knows nothing of prompts, keys or the environment, and nothing here may ever log them.
"""

import logging
import sys
import time
from typing import TextIO

from dashinfer.errors import DashInferError

PROBES = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics"})

access = logging.getLogger("dashinfer.access")
notices = logging.getLogger("dashinfer.notice")  # what is told at any --log-level: the address, for one


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to whatever `sys.stderr` is at that moment, so that lines and a live progress bar do not tear each other."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _Formatter(logging.Formatter):
    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)) + f".{int(record.msecs):03d}"


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions inside nested groups, in order; of a plain exception, itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def describe(error: BaseException) -> str:
    """An error, or the first of a group, as the one line a user sees."""
    first = leaves(error)[0]
    return str(first) if isinstance(first, DashInferError) else f"internal error: {type(first).__name__}: {first}"


def configure(level: str, *, libraries: bool = True) -> None:
    """Set up logging for the process.

    Args:
        level: one of the choices of `--log-level`.
        libraries: take the libraries' warnings too; False where the process is not ours and has its own logging.
    """
    handler = _StandardError()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    ours = logging.getLogger("dashinfer")
    ours.setLevel(level.upper())
    ours.handlers, ours.propagate = [handler], False
    if libraries:
        root = logging.getLogger()
        root.handlers = [handler]
        root.setLevel(logging.WARNING)  # below it some print request bodies
    notices.setLevel(logging.INFO)


def log_access(method: str, target: bytes, status: int, seconds: float, note: str) -> None:
    """One request that ended. `target` is the path as it came, still percent-encoded, so it cannot break the line.

    Probes are logged at debug level: they come every second and say nothing.
    """
    path = target.decode("latin-1")
    path = path if len(path) <= 200 else path[:200] + "..."
    level = logging.DEBUG if path in PROBES else logging.INFO
    access.log(level, "%s %s %d %.0f ms%s", method, path, status, seconds * 1000, f" ({note})" if note else "")
