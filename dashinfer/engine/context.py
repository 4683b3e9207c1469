"""What belongs to the engine that a task works for, for those who are not handed it."""

from contextvars import ContextVar

replica_number: ContextVar[int | None] = ContextVar(
    "replica", default=None
)  # which of several copies of the model; None: the only one
