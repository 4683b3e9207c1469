"""What a user sees while a model is fetched and loaded: bars on a terminal, a few plain lines in a log.

Knows stages by name and numbers, nothing of what they do. `report` may be called from any thread.
"""

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol, Self

from dashinfer.types import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

logger = logging.getLogger("dashinfer.progress")

_LABELS = {
    "download": "Fetching the model",
    "verify": "Checking the file",
    "tokenizer": "Preparing the tokenizer",
    "weights": "Loading weights",
    "warmup": "Warming up",
    "answers": "Answering",
}
_LINE_EVERY = 10.0  # seconds between two log lines of one stage


def _size(count: int, unit: str) -> str:
    if unit != "B":
        return f"{count:,}{' ' + unit if unit else ''}"
    value = float(count)
    for name in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {name}"
        value /= 1024
    return f"{value:.2f} GiB"


class Display(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def report(self, stage: str, done: int, total: int, unit: str) -> None: ...


def report_progress(display: Display, progress: Progress) -> None:
    """A worker's `Progress` frame, shown."""
    display.report(progress.stage, progress.done, progress.total, progress.unit)


class LogDisplay:
    """A line when a stage begins, one every ten seconds while it lasts, and one when it is done."""

    def __init__(self) -> None:
        self._next_line: dict[str, float] = {}
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, stage: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        label = _LABELS.get(stage, stage)
        with self._lock:
            if stage in self._done:
                return
            if total and done >= total:
                self._done.add(stage)
                logger.info("%s: done, %s", label, _size(total, unit))
            elif now >= self._next_line.get(stage, 0.0):
                known = f"{100 * done // total}% of {_size(total, unit)}" if total else _size(done, unit) if done else "..."
                logger.info("%s: %s", label, known)
                self._next_line[stage] = now + _LINE_EVERY


class BarDisplay:
    """A bar a stage, on a terminal. Nothing is imported or drawn before the first report."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._closed = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._closed = True
            if self._bars is not None:
                self._bars.stop()
                self._bars = None

    def _start(self) -> "Bars":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        bars.start()
        return bars

    def report(self, stage: str, done: int, total: int, unit: str) -> None:
        if unit != "B" and not total:
            return  # nothing to measure, so nothing to draw
        amount = f"{_size(done, unit)} / {_size(total, unit)}" if total else _size(done, unit)
        with self._lock:
            if self._closed:
                return
            if self._bars is None:
                self._bars = self._start()
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(_LABELS.get(stage, stage), total=total or None, amount=amount)
            self._bars.update(self._tasks[stage], completed=done, total=total or None, amount=amount)


def make_display() -> Display:
    """Bars where standard error is a terminal, lines elsewhere."""
    return BarDisplay() if sys.stderr.isatty() else LogDisplay()
