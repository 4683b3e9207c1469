"""What belongs to the HTTP request that a task answers, for those who are not handed it."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dashinfer.serving.tracing import RequestTrace

arrival: ContextVar[float] = ContextVar("arrival")  # in time.monotonic's seconds
request_id: ContextVar[str] = ContextVar("request_id", default="-")
charge: ContextVar[Callable[[int], None] | None] = ContextVar("charge", default=None)  # told of tokens as they are used
key_name: ContextVar[bytes] = ContextVar("key_name", default=b"")  # of whoever asks, from `KeyRing.check`
trace: ContextVar["RequestTrace | None"] = ContextVar("trace", default=None)  # of a request that is traced


def trace_failure(error: Exception) -> None:
    """Tell the request's trace, if it has one."""
    if (traced := trace.get()) is not None:
        traced.failed(error)
