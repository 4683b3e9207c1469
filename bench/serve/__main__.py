"""`python -m bench.serve`: the command, and with pictures `python -m bench.vlm`. README.md beside this file has examples."""

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.machine import describe_machine
from bench.serve.servers import read_memory, running
from dashinfer.bench import report
from dashinfer.bench.measure import Run, Settings, measure_round, prepare, schedule
from dashinfer.bench.target import BenchError, Target, parse_body, parse_target, split_label

Extra = dict[str, dict[str, Any]]  # label -> what is known of a target beyond its figures


def at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(at_least_one(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1,4,16") from None


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        pairs = [part.split("x") for part in text.split(",")]
        return tuple((at_least_one(width), at_least_one(height)) for width, height in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 224x224,640x480") from None


def make_parser(program: str = "bench.serve") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description="Measures servers that speak OpenAI's chat API, taking turns in one run."
    )
    add = parser.add_argument
    add("--target", action="append", default=[], metavar="LABEL=URL[=MODEL]", help="a server; repeatable, measured in turns")
    add("--url", help="the one server's base URL, such as http://127.0.0.1:8000/v1; short for --target")
    add("--model", help="with --url: the model's name (default: the first one the server lists)")
    add("--label", default="server", help="with --url: the server's name in tables")
    add("--spawn", action="append", default=[], metavar="LABEL=COMMAND", help="start that target for this run")
    add("--pid", action="append", default=[], metavar="LABEL=PID", help="show the memory of that target's processes")
    add("--body", action="append", default=[], metavar="LABEL=JSON", help="fields added to each request to that target")
    add("--baseline", metavar="LABEL", help="show ratios to this target (default: the last one)")
    add("--concurrency", type=levels, default=(1, 4, 16, 32), metavar="N,N,...", help="requests at the same time (1,4,16,32)")
    add("--requests", type=at_least_one, metavar="N", help="requests in a round (two a worker, at least four)")
    add("--rounds", type=at_least_one, default=3, metavar="N", help="rounds at each concurrency; figures are their medians (3)")
    add("--prompt-tokens", type=at_least_one, default=105, metavar="N", help="length of the prompts, template included (105)")
    add("--output-tokens", type=at_least_one, default=64, metavar="N", help="length of the answers (64)")
    add("--images", type=sizes, default=(), metavar="WxH,...", help="ask about a picture, of these sizes in turn, instead")
    add("--image-format", choices=("png", "jpeg"), default="jpeg", help="of the pictures' files (jpeg)")
    add("--seed", type=int, default=0, help="draws the prompts; take another for a server that has seen them (0)")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer, and for a spawned server's start (600)")
    add("--api-key-from", metavar="VARIABLE", help="environment variable that holds the API key for every target")
    add("--out", type=Path, metavar="FILE.json", help="write results there, and FILE.md and FILE.svg beside it")
    return parser


def read_targets(arguments: argparse.Namespace) -> list[Target]:
    """The targets, labels all different. Raises BenchError."""
    key = None
    if arguments.api_key_from and not (key := os.environ.get(arguments.api_key_from)):
        raise BenchError(f"{arguments.api_key_from} is not set in the environment")
    targets = [parse_target(text, key) for text in arguments.target]
    if arguments.url:
        targets.append(replace(parse_target(f"{arguments.label}={arguments.url}", key), model=arguments.model))
    if not targets:
        raise BenchError("nothing to measure; give --url http://127.0.0.1:8000/v1 or --target LABEL=URL")
    by_label = {target.label: target for target in targets}
    if len(by_label) < len(targets):
        raise BenchError("two targets have the same label")
    for label, body in map(parse_body, arguments.body):
        known_label(label, targets)
        by_label[label] = replace(by_label[label], body=body)
    return [by_label[target.label] for target in targets]


def known_label(label: str, targets: Sequence[Target]) -> str:
    """The label again. Raises BenchError if no target has it."""
    if all(target.label != label for target in targets):
        raise BenchError(f"{label!r} is no target; there are {', '.join(target.label for target in targets)}")
    return label


def read_pids(arguments: argparse.Namespace, targets: Sequence[Target]) -> dict[str, int]:
    pids = {}
    for label, pid in map(split_label, arguments.pid):
        if not pid.isdigit():
            raise BenchError(f"{pid!r} is not a process id")
        pids[known_label(label, targets)] = int(pid)
    return pids


def tell(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: servers' names and answers are not markup."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


async def measure(
    arguments: argparse.Namespace, targets: list[Target], settings: Settings, console: Console
) -> tuple[list[Run], Extra]:
    """Starts what is to be started, measures everything, ends what was started."""
    pids = read_pids(arguments, targets)
    commands = {known_label(label, targets): command for label, command in map(split_label, arguments.spawn)}
    extra: Extra = {target.label: {} for target in targets}
    logs = arguments.out.parent if arguments.out else Path()
    async with AsyncExitStack() as stack:
        runs = []
        for target in targets:
            runs.append(Run(target))
            if (command := commands.get(target.label)) is not None:
                tell(console, f"starting {target.label}: {command}")
                log = logs / f"{target.label}.log"
                pid, seconds = await stack.enter_async_context(running(command, target, log, settings.timeout))
                extra[target.label] |= {"command": command, "startup_seconds": seconds}
                pids[target.label] = pid
        for run in runs:
            tell(console, f"warming up {run.target.label}")
            await prepare(run, settings)
            known = f"{run.target.model}, {run.dialect}" + ("" if settings.images else f", {run.words} words a prompt")
            tell(console, f"{run.target.label}: {known}; says {run.answer!r}")
        for label, pid in pids.items():
            extra[label]["memory_start"] = read_memory(pid)
        await measure_all(runs, settings, console)
        for label, pid in pids.items():
            extra[label]["memory_end"] = read_memory(pid)
    return runs, extra


async def measure_all(runs: list[Run], settings: Settings, console: Console) -> None:
    """Every round of every target, with a progress bar on a terminal and a line a round anywhere."""
    total = sum(settings.requests_at(concurrency) for concurrency, _, _ in schedule(runs, settings))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=total)

        def on_answer() -> None:
            progress.advance(task)

        for concurrency, number, run in schedule(runs, settings):
            progress.update(task, description=f"{run.target.label} at {concurrency}, round {number + 1} of {settings.rounds}")
            figures = await measure_round(run, concurrency, number, settings, on_answer)
            images = f"{figures.requests_per_second:.1f} images/s, " if settings.images else ""
            speed = f"{images}{figures.tokens_per_second:.1f} tokens/s, {figures.errors} errors"
            tell(console, f"{run.target.label} at {concurrency}, round {number + 1}: {speed}")


def write(
    path: Path,
    runs: list[Run],
    settings: Settings,
    baseline: str | None,
    machine: dict[str, Any],
    extra: Extra,
    program: str,
) -> list[Path]:
    """Writes JSON, Markdown and, where there is matplotlib, a plot. Returns what was written."""
    command = shlex.join(["python", "-m", program, *sys.argv[1:]])
    path.write_text(json.dumps(report.as_json(runs, settings, baseline, machine, extra), indent=1) + "\n")
    markdown = path.with_suffix(".md")
    markdown.write_text(report.as_markdown(runs, settings, baseline, machine, extra, command))
    written = [path, markdown]
    try:
        from dashinfer.bench.plot import draw
    except ImportError:
        print('no plot: matplotlib is missing; pip install -e ".[bench]"', file=sys.stderr)
    else:
        draw(runs, path.with_suffix(".svg"), settings.rate)
        written.append(path.with_suffix(".svg"))
    return written


def run(arguments: argparse.Namespace, console: Console, program: str) -> int:
    """The whole command. Returns the exit status: 1 if any request failed. Raises BenchError."""
    targets = read_targets(arguments)
    default = targets[-1].label if len(targets) > 1 else None
    baseline = known_label(arguments.baseline, targets) if arguments.baseline else default
    if arguments.out is not None:
        if arguments.out.suffix != ".json":
            raise BenchError(f"--out {arguments.out} does not end in .json")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    machine = describe_machine()
    runs, extra = trio.run(measure, arguments, targets, settings, console)
    console.print(report.as_table(runs, baseline, settings.rate))
    for item in runs:
        for line in report.memory_lines(extra[item.target.label]):
            tell(console, f"{item.target.label}: {line}")
    for caveat in report.caveats(runs, settings):
        tell(console, f"note: {caveat}", style="yellow")
    if arguments.out is not None:
        written = write(arguments.out, runs, settings, baseline, machine, extra, program)
        tell(console, f"wrote {', '.join(map(str, written))}")
    return 1 if any(item.errors for item in runs) else 0


def main(program: str = "bench.serve", **defaults: Any) -> None:
    """The command under a name of its own, with other defaults of its options."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=128)  # a log has no width to fit
    # Trio turns SIGINT into an orderly end; SIGTERM is to end spawned servers just as well.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    status = 0
    try:
        parser = make_parser(program)
        parser.set_defaults(**defaults)
        status = run(parser.parse_args(), console, program)
    except* BenchError as group:
        print(f"{program}: {group.exceptions[0]}", file=sys.stderr)
        status = 2
    except* KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


if __name__ == "__main__":
    main()
