"""Options and the closing table of the pytest benchmark harness (`test_serve.py`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import trio
from rich.console import Console

from dashinfer.bench import report
from dashinfer.bench.measure import Run, measure_round, prepare, schedule
from dashinfer.bench.settings import Settings
from dashinfer.bench.target import Target, parse_target

RUNS = pytest.StashKey[list[Run]]()
SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench.serve")
    group.addoption("--url", help="base URL of the server to measure, such as http://127.0.0.1:8000/v1")
    group.addoption("--model", help="its model (default: the first one it lists)")
    group.addoption("--peer-url", help="base URL of a server to compare with, measured in turns")
    group.addoption("--peer-model", help="the peer's model")
    group.addoption("--concurrency", default="1,4,16", help="requests at the same time")
    group.addoption("--rounds", type=int, default=3, help="rounds at each concurrency")
    group.addoption("--output-tokens", type=int, default=64, help="length of the answers")
    group.addoption("--prompt-tokens", type=int, default=105, help="length of the prompts")
    group.addoption(
        "--least-ratio", default="", metavar="N:RATIO,...", help="least multiple of the peer's tokens/s at concurrency N"
    )


@dataclass
class Outcome:
    """What was measured: `runs[0]` is the server, `runs[1]` the peer if there is one."""

    settings: Settings
    runs: list[Run] = field(default_factory=list)


async def measure_all(targets: list[Target], settings: Settings) -> list[Run]:
    """Every level and round of every target, in turns."""
    runs = [Run(target) for target in targets]
    for run in runs:
        await prepare(run, settings)
    for concurrency, number, run in schedule(runs, settings):
        await measure_round(run, concurrency, number, settings)
    return runs


@pytest.fixture(scope="session")
def outcome(pytestconfig: pytest.Config) -> Iterator[Outcome]:
    option = pytestconfig.getoption
    if option("--url") is None:
        pytest.skip("give a server: --url http://127.0.0.1:8000/v1")
    targets = [replace(parse_target(f"server={option('--url')}"), model=option("--model"))]
    if option("--peer-url"):
        targets.append(replace(parse_target(f"peer={option('--peer-url')}"), model=option("--peer-model")))
    settings = Settings(
        concurrency=tuple(int(part) for part in option("--concurrency").split(",")),
        rounds=option("--rounds"),
        prompt_tokens=option("--prompt-tokens"),
        output_tokens=option("--output-tokens"),
    )
    runs = trio.run(measure_all, targets, settings)
    pytestconfig.stash[RUNS], pytestconfig.stash[SETTINGS] = runs, settings
    return Outcome(settings, runs)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "concurrency" in metafunc.fixturenames:
        metafunc.parametrize("concurrency", [int(part) for part in metafunc.config.getoption("--concurrency").split(",")])
    if "least_ratio" in metafunc.fixturenames:
        pairs = [part.split(":") for part in metafunc.config.getoption("--least-ratio").split(",") if part]
        metafunc.parametrize(("at", "least_ratio"), [(int(at), float(ratio)) for at, ratio in pairs])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if runs := config.stash.get(RUNS, None):
        terminalreporter.section("bench.serve")
        console = Console(width=128)
        with console.capture() as capture:
            for table in report.as_tables(runs, config.stash[SETTINGS], "peer" if len(runs) > 1 else None):
                console.print(table)
        terminalreporter.write_line(capture.get())
