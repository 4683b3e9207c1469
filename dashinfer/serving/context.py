"""What belongs to the HTTP request that a task answers, for those who are not handed it."""

from collections.abc import Hashable
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dashinfer.serving.limits import Lease
    from dashinfer.serving.tracing import RequestTrace

arrival: ContextVar[float] = ContextVar("arrival")  # in time.monotonic's seconds
request_id: ContextVar[str] = ContextVar("request_id", default="-")
lease: ContextVar["Lease | None"] = ContextVar("lease", default=None)  # of what its key may use; None: all there is
key_name: ContextVar[bytes] = ContextVar("key_name", default=b"")  # of whoever asks, from `KeyRing.check`
client: ContextVar[Hashable] = ContextVar("client", default=None)  # its key's name, or its address where no key is needed
trace: ContextVar["RequestTrace | None"] = ContextVar("trace", default=None)  # of a request that is traced


def trace_failure(error: Exception) -> None:
    """Tell the request's trace, if it has one."""
    if (traced := trace.get()) is not None:
        traced.failed(error)


def take_places(least: int, most: int) -> int:
    """How many sequences, from `least` to `most`, the request may have at a time. Raises RateLimitExceeded."""
    held = lease.get()
    return most if held is None else held.take(least, most)
