"""What belongs to the HTTP request that a task answers, for those who are not handed it."""

from collections.abc import Callable
from contextvars import ContextVar

arrival: ContextVar[float] = ContextVar("arrival")  # in time.monotonic's seconds
request_id: ContextVar[str] = ContextVar("request_id", default="-")
charge: ContextVar[Callable[[int], None] | None] = ContextVar("charge", default=None)  # told of tokens as they are used
