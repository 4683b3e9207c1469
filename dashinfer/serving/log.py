"""Logging: one format on standard error for everything this process says, one line a request, one line for an error.

Knows levels and line formats; knows nothing of keys or the environment, and nothing here may ever log them. Prompts are
logged by `log_prompt` alone, which is called with `--log-prompts` only.
"""

import logging
import re
import sys
import time
from typing import TextIO

import msgspec

from dashinfer.config import LogFormat
from dashinfer.engine.context import replica_number
from dashinfer.errors import DashInferError

PROBES = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics"})

_NOT_VISIBLE = re.compile(rb"[^!-~]")

access = logging.getLogger("dashinfer.access")
prompts = logging.getLogger("dashinfer.prompts")
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

    def formatMessage(self, record: logging.LogRecord) -> str:
        if (number := replica_number.get()) is not None:
            record.message = f"replica {number}: {record.message}"
        return super().formatMessage(record)


class _JsonFormatter(logging.Formatter):
    """An object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, `replica` where there are several, `exception` if
    there is one, and what the record has under `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if (number := replica_number.get()) is not None:
            line["replica"] = number
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions inside nested groups, in order; of a plain exception, itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def describe(error: BaseException) -> str:
    """An error, or the first of a group, as the one line a user sees."""
    first = leaves(error)[0]
    return str(first) if isinstance(first, DashInferError) else f"internal error: {type(first).__name__}: {first}"


def configure(level: str, format: LogFormat = "text", *, libraries: bool = True) -> None:
    """Set up logging for the process.

    Args:
        level, format: of the choices of `--log-level` and `--log-format`.
        libraries: take the libraries' warnings too; False where the process is not ours and has its own logging.
    """
    handler = _StandardError()
    handler.setFormatter(_JsonFormatter() if format == "json" else _Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    ours = logging.getLogger("dashinfer")
    ours.setLevel(level.upper())
    ours.handlers, ours.propagate = [handler], False
    if libraries:
        root = logging.getLogger()
        root.handlers = [handler]
        root.setLevel(logging.WARNING)  # below it some print request bodies
    notices.setLevel(logging.INFO)


def log_prompt(request_id: str, prompt: str) -> None:
    """The text that the model is given."""
    prompts.info("request %s prompt: %r", request_id, prompt, extra={"fields": {"request_id": request_id, "prompt": prompt}})


def _shown(text: bytes, most: int) -> str:
    """At most so many characters and three dots."""
    encoded = _NOT_VISIBLE.sub(lambda match: b"%%%02X" % ord(match[0]), text[: most + 1]).decode("ascii")
    return encoded if len(encoded) <= most else encoded[:most] + "..."


def log_access(method: str, target: bytes, status: int, seconds: float, note: str, request_id: str) -> None:
    """One request that ended. `target` is the path as it came, still percent-encoded; what HTTP/2 lets through that is not is
    percent-encoded here, in the method too, so neither breaks the line, or writes to a terminal what it obeys.

    Probes are logged at debug level: they come every second and say nothing.
    """
    method, path = _shown(method.encode(errors="backslashreplace"), 20), _shown(target, 200)
    level = logging.DEBUG if path in PROBES else logging.INFO
    fields = {"method": method, "path": path, "status": status, "milliseconds": round(seconds * 1000, 1)}
    fields |= {"request_id": request_id} | ({"note": note} if note else {})
    text = f" ({note})" if note else ""
    access.log(level, "%s %s %d %.0f ms%s %s", method, path, status, seconds * 1000, text, request_id, extra={"fields": fields})
