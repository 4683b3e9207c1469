"""What belongs to the engine that a task works for, for those who are not handed it."""

from contextvars import ContextVar

# Which of several copies of the model; None: the only one.
replica_number: ContextVar[int | None] = ContextVar("replica_number", default=None)
