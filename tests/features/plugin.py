"""A pytest plugin: the markers `feature` and `compiles`, the option --features, and a red end where README claims too much.

Outcomes travel with the reports, so that those of a distributed run reach the process that writes the file. README is looked at
after a whole run alone: all of `testpaths`, nothing deselected, nothing stopped.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.selection import runs_on_gpu

from . import table
from .catalogue import CATALOGUE, Feature
from .run import Proof, Run, stored_gpu_runs, write

COMMANDS = "python -m pytest --features features.json, then python -m tests.features README.md features.json"
NARROWING = ("keyword", "lf", "ignore", "ignore_glob", "deselect", "stepwise", "collectonly", "setupplan")
LONGER = "clients"  # the marker of tests that a run leaves out, unless it is asked for them


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", metavar="FILE", type=Path, help="write which features the tests proved, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    register(config, CATALOGUE)


def register(config: pytest.Config, catalogue: Mapping[str, Sequence[Feature]]) -> None:
    config.addinivalue_line("markers", "feature(area, name): proves a row of README's table of features")
    config.addinivalue_line("markers", "compiles(variant, target): compiles a kernel variant for a GPU that need not be here")
    config.pluginmanager.register(Recorder(config, catalogue))


class Recorder:
    """Notes how each marked test ended."""

    def __init__(self, config: pytest.Config, catalogue: Mapping[str, Sequence[Feature]]) -> None:
        self._config = config
        self._catalogue = catalogue
        self._order = [(area, feature.name) for area, features in catalogue.items() for feature in features]
        path = config.getoption("--features")
        self._file: Path | None = path and path.absolute()
        self._deselected = False
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._complaints: list[str] = []
        self._notes: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("feature"):
                if marker.args not in self._order or marker.kwargs:
                    raise pytest.UsageError(f"{item.nodeid}: no row of tests/features/catalogue.py is {marker.args}")

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._deselected |= any(item.get_closest_marker(LONGER) is None for item in items)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: Any = yield
        report.proves = sorted({marker.args for marker in item.iter_markers("feature")})
        report.compiles = [marker.args for marker in item.iter_markers("compiles")]
        report.needs_gpu = item.get_closest_marker("gpu") is not None
        report.gpu = gpu_name() if runs_on_gpu(item) else None
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.setdefault(report.nodeid, []).append(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self._config, "workerinput") or self._config.option.collectonly:
            return
        run = self._run()
        if self._file is not None:
            write(run, self._file)
        if self._is_whole(session):
            self._compare(run)
        if self._complaints and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: "pytest.TerminalReporter") -> None:
        if self._complaints or self._notes:
            terminalreporter.section("README's table of features", red=bool(self._complaints))
            for line in (*self._complaints, *self._notes):
                terminalreporter.line(line)
            terminalreporter.line(f"It is written by: {COMMANDS}")

    def _run(self) -> Run:
        proofs = {key: Proof(area=key[0], feature=key[1]) for key in self._order}
        variants: dict[str, dict[str, str]] = {}
        gpus, seen = set(), set()
        for reports in self._reports.values():
            outcome, last = outcome_of(reports), reports[-1]
            if outcome is None:
                continue
            gpus |= {last.gpu} - {None}
            for area, name in last.proves:
                seen.add((area, name))
                count(proofs[area, name], outcome, on_gpu=last.gpu is not None, needs_gpu=last.needs_gpu)
            for variant, target in last.compiles:
                variants.setdefault(variant, {})[target] = outcome
        return Run(
            gpu=", ".join(sorted(gpus)) or None,
            features=[proofs[key] for key in self._order if key in seen],
            variants={name: dict(sorted(variants[name].items())) for name in sorted(variants)},
        )

    def _is_whole(self, session: pytest.Session) -> bool:
        config = self._config
        root = config.rootpath
        if self._deselected or any(getattr(config.option, name, None) for name in NARROWING):
            return False
        if config.option.markexpr not in ("", f"not {LONGER}"):
            return False
        asked = {(config.invocation_params.dir / argument).resolve() for argument in config.args}
        if asked != {(root / path).resolve() for path in config.getini("testpaths")}:
            return False
        items = getattr(session, "items", [])  # a distributed run has them elsewhere, and is not compared
        return bool(items) and all(outcome_of(self._reports.get(item.nodeid, ())) for item in items)

    def _compare(self, run: Run) -> None:
        path = self._config.rootpath / "README.md"
        if not path.exists():
            return
        try:
            claimed = table.parse(path.read_text(encoding="utf-8"))
            gpu_runs = stored_gpu_runs(self._config.rootpath)
        except ValueError as error:
            self._complaints.append(str(error))
            return
        proven = table.rows(self._catalogue, run, [*gpu_runs, run])
        untried = table.untried(self._catalogue, run)
        for name in table.excess(claimed, proven):
            if name in untried:
                self._notes.append(f"claims what needs {untried[name]}, which this run did not have: {name}")
            else:
                self._complaints.append(f"claims what this run did not prove: {name}")
        if claimed:
            self._notes += [f"leaves out what this run proved: {name}" for name in table.excess(proven, claimed)]


def gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def outcome_of(reports: Sequence[pytest.TestReport]) -> str | None:
    """Of a test's phases. None: it was not run to its end. What is expected to fail counts as skipped, however it ended."""
    if any(report.failed for report in reports):
        return "failed"
    if any(report.skipped or hasattr(report, "wasxfail") for report in reports):
        return "skipped"
    phases = {report.when for report in reports}
    return "passed" if phases == {"setup", "call", "teardown"} else None


def count(proof: Proof, outcome: str, *, on_gpu: bool, needs_gpu: bool) -> None:
    if outcome == "skipped":
        proof.skipped += 1
        proof.needs_gpu += needs_gpu
    else:
        field = outcome + ("_on_gpu" if on_gpu else "")
        setattr(proof, field, getattr(proof, field) + 1)
