"""How a command's life becomes an exit status: what ends it is told in one line on standard error."""

import signal
import sys
import traceback
from collections.abc import Awaitable, Callable

import trio

from dashinfer.errors import DashInferError, StartupError
from dashinfer.serving import log


def run_to_end(life: Callable[[], Awaitable[None]], log_level: str) -> int:
    """Run a root task.

    Returns:
        0 when it ends by itself, 1 after a failure, 130 after Ctrl-C where nobody else takes that signal.

    Raises:
        StartupError: it could not start.
    """
    try:
        trio.run(life)
    except (Exception, BaseExceptionGroup, KeyboardInterrupt) as error:
        causes = log.leaves(error)
        for cause in causes:
            if isinstance(cause, StartupError):
                raise cause from error
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            return 128 + signal.SIGINT
        if log_level == "debug" or not all(isinstance(cause, DashInferError) for cause in causes):
            traceback.print_exception(error)
        for line in dict.fromkeys(map(log.describe, causes)):
            print(f"dashinfer_serve: error: {line}", file=sys.stderr)
        return 1
    return 0
