"""`python -m bench.parallel`: a model over several ranks, its speed, and what a killed rank costs. See `bench/README.md`."""

import argparse
import json
import shlex
import signal
import socket
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import trio
from rich.console import Console
from rich.table import Table

from bench.machine import describe_machine
from bench.parallel import report
from bench.parallel.loading import time_loading
from bench.parallel.recovery import Kill, Recovery, kill_ranks
from bench.serve.__main__ import measure
from bench.serve.servers import running
from dashinfer.bench import report as serve_report
from dashinfer.bench.cli import at_least_one, levels
from dashinfer.bench.command import Outcome, tell
from dashinfer.bench.settings import Settings
from dashinfer.bench.target import Target
from dashinfer.config import ServerConfig
from dashinfer.errors import BenchError, DashInferError


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.parallel", description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="what is served (demo)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    add("--data-type", default="float32", help="of activations (float32, where a prefill gives exactly what decoding did)")
    add("--tensor-parallel", type=levels, default=(1, 2), metavar="N,N,...", help="numbers of ranks (1,2)")
    add("--concurrency", type=levels, default=(1, 8), metavar="N,N,...", help="requests at the same time (1,8)")
    add("--rounds", type=at_least_one, default=3, metavar="N", help="at each concurrency (3)")
    add("--prompt-tokens", type=at_least_one, default=105, metavar="N", help="length of the prompts (105)")
    add("--output-tokens", type=at_least_one, default=64, metavar="N", help="length of the answers (64)")
    add(
        "--kills",
        type=int,
        choices=range(9),
        default=5,
        metavar="N",
        help="ranks killed, up to a server's default patience (5)",
    )
    add("--killed-tokens", type=at_least_one, default=256, metavar="N", help="length of an answer with a kill in it (256)")
    add("--after", type=float, default=1.5, metavar="SECONDS", help="from such a request to its kill (1.5)")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer, and for a server's start (600)")
    add("--out", type=Path, metavar="FILE.json", help="write results there, and FILE.md beside it")
    return parser


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_target(arguments: argparse.Namespace, ranks: int) -> tuple[Target, str]:
    """A server with so many ranks, and the command that starts it."""
    port = free_port()
    command = [sys.executable, "-m", "dashinfer.serving", "--model", arguments.model, "--device", arguments.device]
    command += ["--data-type", arguments.data_type, "--tensor-parallel", str(ranks), "--host", "127.0.0.1", "--port", str(port)]
    return Target(label=f"tp{ranks}", url=f"http://127.0.0.1:{port}/v1"), shlex.join(command)


async def measure_speed(arguments: argparse.Namespace, console: Console) -> tuple[Outcome, Settings]:
    """`bench.serve` with one server for each number of ranks, taking turns."""
    targets = [make_target(arguments, ranks) for ranks in arguments.tensor_parallel]
    settings = Settings(
        concurrency=arguments.concurrency,
        rounds=arguments.rounds,
        prompt_tokens=arguments.prompt_tokens,
        output_tokens=arguments.output_tokens,
        timeout=arguments.timeout,
    )
    commands = {target.label: command for target, command in targets}
    logs = arguments.out.parent if arguments.out else Path()
    return await measure([target for target, _ in targets], settings, console, commands=commands, logs=logs), settings


async def measure_recovery(arguments: argparse.Namespace, ranks: int, console: Console) -> Recovery:
    """Load the model alone, then kill ranks under a server of it."""
    config = ServerConfig(model=arguments.model, device=arguments.device, data_type=arguments.data_type, tensor_parallel=ranks)
    loading = await time_loading(config)
    target, command = make_target(arguments, ranks)
    recovery = Recovery(label=target.label, ranks=ranks, weights=loading.weights, start=loading.start)
    tell(console, f"{target.label}: ranks are ready after {loading.start:.2f} s, {loading.weights:.2f} s of them for weights")
    if not arguments.kills:
        return recovery

    def on_kill(kill: Kill) -> None:
        answer = "the same answer" if kill.same else "another answer"
        tell(console, f"{target.label}: the next token {kill.seconds:.2f} s after the kill; {answer}")

    log = (arguments.out.parent if arguments.out else Path()) / f"{target.label}-killed.log"
    async with AsyncExitStack() as stack:
        server, _ = await stack.enter_async_context(running(command, target, log, arguments.timeout))
        recovery.kills = await kill_ranks(
            target,
            server,
            kills=arguments.kills,
            after=arguments.after,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=arguments.killed_tokens,
            limit=arguments.timeout,
            on_kill=on_kill,
        )
    return recovery


async def run(arguments: argparse.Namespace, console: Console) -> int:
    """The whole command. Returns the exit status: 1 if a request failed or a mark was missed. Raises BenchError."""
    if arguments.out is not None:
        if arguments.out.suffix != ".json":
            raise BenchError(f"--out {arguments.out} does not end in .json")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    outcome, settings = await measure_speed(arguments, console)
    if not outcome.complete:
        raise KeyboardInterrupt
    runs, extra = outcome.runs, outcome.extra
    recoveries = [await measure_recovery(arguments, ranks, console) for ranks in arguments.tensor_parallel]
    baseline = runs[0].target.label if len(runs) > 1 else None
    for table in serve_report.as_tables(runs, settings, baseline):
        console.print(table)
    table = Table(*report.COLUMNS)
    for row in report.rows(runs, recoveries):
        table.add_row(*row)
    console.print(table)
    if arguments.out is not None:
        found = serve_report.as_json(runs, settings, baseline, machine, extra)
        found["recovery"] = report.as_json(recoveries)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
        command = shlex.join(["python", "-m", "bench.parallel", *sys.argv[1:]])
        speed = serve_report.as_markdown(runs, settings, baseline, machine, extra, command)
        arguments.out.with_suffix(".md").write_text(f"{speed}\n{report.as_markdown(runs, recoveries)}")
        tell(console, f"wrote {arguments.out}, {arguments.out.with_suffix('.md')}")
    missed = any(each.kills and not each.holds for each in recoveries)
    return 1 if missed or any(each.errors for each in runs) else 0


def main() -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log has no width to fit
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    status = 0
    try:
        status = trio.run(run, make_parser().parse_args(), console)
    except* (BenchError, DashInferError) as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"bench.parallel: {error}", file=sys.stderr)
        status = 2
    except* KeyboardInterrupt:
        status = 130
    raise SystemExit(status)


if __name__ == "__main__":
    main()
