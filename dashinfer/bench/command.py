"""What the command does once its flags are good: measure with a progress bar, show, write.

`python -m bench.serve` of a clone, which also starts servers, is made of the same parts.
"""

import argparse
import json
import os
import resource
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dashinfer.bench import report
from dashinfer.bench.dataset import read_dataset
from dashinfer.bench.measure import Run, measure_round, prepare, schedule
from dashinfer.bench.questions import Question
from dashinfer.bench.report import Extra
from dashinfer.bench.settings import Settings
from dashinfer.bench.target import Target
from dashinfer.errors import BenchError

SECRET_FLAGS = ("--api-key", "--header")
LOG_WIDTH = 128  # a log has no width to fit


@dataclass(kw_only=True)
class Outcome:
    """What was measured.

    Attributes:
        complete: whether it was not interrupted.
        machine: where, if that is known.
        extra: what is known of targets beyond their figures.
    """

    runs: list[Run]
    complete: bool
    machine: dict[str, Any] | None = None
    extra: Extra = field(default_factory=dict)


def tell(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: servers' names and answers are not markup."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def guarded(program: str, work: Callable[[Console], int], *, to_stderr: bool = False) -> int:
    """`work`'s exit status; 2 after a BenchError, told in one line, and 130 after Ctrl-C or SIGTERM."""
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=LOG_WIDTH)
    # Trio turns SIGINT into an orderly end; SIGTERM is to end what was started just as well.
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    status = 0
    try:
        status = work(console)
    except* BenchError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"{program}: error: {error}", file=sys.stderr)
        status = 2
    except* KeyboardInterrupt:
        print(f"{program}: interrupted before anything was measured", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return status


def main(
    arguments: argparse.Namespace, given: Sequence[str], targets: list[Target], settings: Settings, baseline: str | None
) -> int:
    """The command. Returns the exit status."""

    def work(console: Console) -> int:
        prepare_out(arguments.out)
        allow_connections()
        outcome = trio.run(measure, targets, read_questions(arguments, settings), settings, console)
        show(console, outcome, settings, baseline)
        write(console, outcome, settings, baseline, arguments, ["dashinfer_bench", *given])
        return exit_status(outcome)

    return guarded("dashinfer_bench", work, to_stderr=arguments.json)


def prepare_out(path: Path | None) -> None:
    """Makes the folder for results. Raises BenchError where they cannot be written."""
    if path is None:
        return
    if path.suffix != ".json":
        raise BenchError(f"--out {path} does not end in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--out {path}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchError(f"--out {path} cannot be written")


def allow_connections() -> None:
    """Each request has a connection of its own: as many files may be open as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS has a bound that it does not tell
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def read_questions(arguments: argparse.Namespace, settings: Settings) -> list[Question]:
    """Those of `--dataset`; none without one. Raises BenchError."""
    return read_dataset(arguments.dataset, settings, arguments.output_tokens) if arguments.dataset else []


def exit_status(outcome: Outcome) -> int:
    if not outcome.complete:
        return 130
    return 1 if any(run.errors for run in outcome.runs) else 0


async def measure(targets: Sequence[Target], questions: Sequence[Question], settings: Settings, console: Console) -> Outcome:
    """Prepares every target, then measures all. Raises BenchError."""
    runs = [Run(target, dataset=questions) for target in targets]
    await prepare_all(runs, settings, console)
    return Outcome(runs=runs, complete=await measure_all(runs, settings, console))


async def prepare_all(runs: Sequence[Run], settings: Settings, console: Console) -> None:
    for run in runs:
        tell(console, f"warming up {run.target.label}")
        await prepare(run, settings)
        known = f"{run.target.model}, {run.dialect}" + (f", {run.words} words a prompt" if run.words else "")
        tell(console, f"{run.target.label}: {known}; says {run.answer!r}")


async def measure_all(runs: Sequence[Run], settings: Settings, console: Console) -> bool:
    """Every round of every target, with a progress bar on a terminal and a line a round anywhere.

    Returns:
        Whether all was measured: SIGINT and SIGTERM end it, and what was answered until then stays in `runs`.
    """
    plan = list(schedule(runs, settings))
    counts = [settings.requests_at(level) for level, _, _ in plan]
    total = None if None in counts else sum(count for count in counts if count is not None)
    complete = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=total)

        def on_answer() -> None:
            progress.advance(task)

        async with trio.open_nursery() as nursery:
            await nursery.start(_cancel_on_signal, nursery.cancel_scope)
            for level, number, run in plan:
                where = f"{run.target.label} at {level:g}"
                progress.update(task, description=f"{where}, round {number + 1} of {settings.rounds}")
                figures = await measure_round(run, level, number, settings, on_answer)
                images = f"{figures.requests_per_second:.1f} images/s, " if settings.images else ""
                speed = f"{images}{figures.tokens_per_second:.1f} tokens/s, {figures.errors} errors"
                tell(console, f"{where}, round {number + 1}: {speed}")
            complete = True
            nursery.cancel_scope.cancel()
    return complete


async def _cancel_on_signal(scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            scope.cancel()


def show(console: Console, outcome: Outcome, settings: Settings, baseline: str | None) -> None:
    """The tables, and what one must know to read them."""
    runs = outcome.runs
    if not outcome.complete:
        tell(console, "interrupted: the tables have what was answered until then", style="yellow")
    if any(run.levels for run in runs):
        for table in report.as_tables(runs, settings, baseline):
            console.print(table)
    for run in runs:
        for line in report.memory_lines(outcome.extra.get(run.target.label, {})):
            tell(console, f"{run.target.label}: {line}")
    for caveat in report.caveats(runs, settings):
        tell(console, f"note: {caveat}", style="yellow")


def write(
    console: Console,
    outcome: Outcome,
    settings: Settings,
    baseline: str | None,
    arguments: argparse.Namespace,
    command: Sequence[str],
) -> None:
    """JSON where it was asked for; with `--out`, Markdown too, and a plot where there is matplotlib and something to plot.

    Args:
        command: what was typed, which the Markdown shows without its secrets.
    """
    path: Path | None = arguments.out
    if path is None and not arguments.json:
        return
    runs, machine, extra, interrupted = outcome.runs, outcome.machine, outcome.extra, not outcome.complete
    found = report.as_json(runs, settings, baseline, machine, extra, interrupted=interrupted, detailed=arguments.detailed)
    text = json.dumps(found, indent=1, allow_nan=False)
    if arguments.json:
        print(text)
    if path is None:
        return
    path.write_text(text + "\n")
    typed = shlex.join(without_secrets(command))
    markdown = report.as_markdown(runs, settings, baseline, machine, extra, typed, interrupted=interrupted)
    path.with_suffix(".md").write_text(markdown)
    written = [path, path.with_suffix(".md")]
    try:
        from dashinfer.bench.plot import draw
    except ImportError:
        tell(console, 'no plot: matplotlib is missing; pip install "dashinfer[bench]"')
    else:
        draw(runs, path.with_suffix(".svg"), settings)
        written.append(path.with_suffix(".svg"))
    tell(console, f"wrote {', '.join(map(str, written))}")


def without_secrets(command: Sequence[str]) -> list[str]:
    """The command with `...` for what follows a flag that may hold a key."""
    shown: list[str] = []
    for word in command:
        flag = word.partition("=")[0]
        if shown and shown[-1] in SECRET_FLAGS:
            shown.append("...")
        elif flag != word and flag in SECRET_FLAGS:
            shown.append(f"{flag}=...")
        else:
            shown.append(word)
    return shown
