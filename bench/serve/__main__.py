"""`python -m bench.serve`: `dashinfer_bench`, and servers that it starts; with pictures, `python -m bench.vlm`."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio
from rich.console import Console

from bench.machine import describe_machine
from bench.serve.servers import read_memory, running
from dashinfer.bench import cli, command
from dashinfer.bench.command import Outcome, tell
from dashinfer.bench.measure import Run
from dashinfer.bench.questions import Question
from dashinfer.bench.report import Extra
from dashinfer.bench.settings import Settings
from dashinfer.bench.target import Target, split_label
from dashinfer.errors import BenchError


def make_parser(program: str = "bench.serve") -> argparse.ArgumentParser:
    parser = cli.make_parser(f"python -m {program}")
    add = parser.add_argument_group("servers on this machine").add_argument
    add("--spawn", action="append", default=[], metavar="LABEL=COMMAND", help="start that target for this run")
    add("--pid", action="append", default=[], metavar="LABEL=PID", help="show the memory of that target's processes")
    return parser


def read_pids(arguments: argparse.Namespace, targets: Sequence[Target]) -> dict[str, int]:
    pids = {}
    for label, pid in map(split_label, arguments.pid):
        if not pid.isdigit():
            raise BenchError(f"{pid!r} is not a process id")
        pids[cli.known_label(label, targets)] = int(pid)
    return pids


async def measure(
    targets: Sequence[Target],
    settings: Settings,
    console: Console,
    *,
    questions: Sequence[Question] = (),
    commands: dict[str, str] | None = None,
    pids: dict[str, int] | None = None,
    logs: Path = Path(),
) -> Outcome:
    """Starts what is to be started, measures everything, ends what was started. Raises BenchError.

    Args:
        commands: what starts a target, by its label.
        pids: processes that run already, by label.
        logs: the folder for what started servers print.
    """
    pids = dict(pids or {})
    extra: Extra = {target.label: {} for target in targets}
    async with AsyncExitStack() as stack:
        runs = []
        for target in targets:
            runs.append(Run(target, dataset=questions))
            if (line := (commands or {}).get(target.label)) is not None:
                tell(console, f"starting {target.label}: {line}")
                log = logs / f"{target.label}.log"
                pid, seconds = await stack.enter_async_context(running(line, target, log, settings.timeout))
                extra[target.label] |= {"command": line, "startup_seconds": seconds}
                pids[target.label] = pid
        await command.prepare_all(runs, settings, console)
        for label, pid in pids.items():
            extra[label]["memory_start"] = read_memory(pid)
        complete = await command.measure_all(runs, settings, console)
        for label, pid in pids.items():
            extra[label]["memory_end"] = read_memory(pid)
    return Outcome(runs=runs, complete=complete, extra=extra)


def main(program: str = "bench.serve", **defaults: Any) -> None:
    """The command under a name of its own, with other defaults of its options."""
    parser = make_parser(program)
    parser.set_defaults(**defaults)
    arguments = parser.parse_args()

    def work(console: Console) -> int:
        targets, settings = cli.read_targets(arguments), cli.read_settings(arguments)
        baseline = cli.read_baseline(arguments, targets)
        cli.check_packages(settings)
        command.prepare_out(arguments.out)

        async def measure_here() -> Outcome:
            return await measure(
                targets,
                settings,
                console,
                questions=command.read_questions(arguments, settings),
                commands={cli.known_label(label, targets): line for label, line in map(split_label, arguments.spawn)},
                pids=read_pids(arguments, targets),
                logs=arguments.out.parent if arguments.out else Path(),
            )

        command.allow_connections()
        machine = describe_machine()
        outcome = trio.run(measure_here)
        outcome.machine = machine
        command.show(console, outcome, settings, baseline)
        command.write(console, outcome, settings, baseline, arguments, ["python", "-m", program, *sys.argv[1:]])
        return command.exit_status(outcome)

    raise SystemExit(command.guarded(program, work, to_stderr=arguments.json))


if __name__ == "__main__":
    main()
