"""`python -m bench.gpu`: everything that is measured on a GPU, in one command that ends in time.

Sections run one after the other in processes of their own, each with its share of what time is left; results are written after
each. The GPU tests come first: nothing is measured unless they pass. Needs nothing but Python itself; sections need more.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import report
from bench.machine import describe_machine

ROOT = Path(__file__).parents[2]
# Of the time that is left, a section takes its weight's share among those still to come.
WEIGHTS = {"tests": 230, "kernels": 170, "engine": 120, "peer": 90, "quantized": 100, "vlm": 70, "demo": 100}
RESERVE = 10.0  # seconds kept for ending
GRACE = 10.0  # seconds past its time that a section has to end by itself
TEST_WORKERS = 12


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Tests and measures everything on one CUDA GPU.")
    add = parser.add_argument
    add("--dry-run", action="store_true", help="toy sizes on CPU, through Triton's interpreter; keeps no figures without --out")
    add("--out", type=Path, metavar="PATH", help="write PATH.json and PATH.md (default: bench/results/gpu-NAME-OF-THE-GPU)")
    add("--minutes", type=float, default=9.0, metavar="N", help="end within this time (9)")
    add("--only", metavar="NAME,...", help=f"these sections of {', '.join(WEIGHTS)}; the result says what was left out")
    add("--demo", type=Path, metavar="FILE", help="the demo model's .gguf file (default: where the server keeps it)")
    add("--commit", metavar="HASH", help="the commit, where the sources came without git")
    add("--make-reference", action="store_true", help="store the tokens that this machine's CPU gives for the demo, and end")
    return parser


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends what was started, too
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.make_reference:
        from bench.gpu.demo import make_reference

        make_reference(arguments.demo)
        return 0
    names = list(WEIGHTS) if arguments.only is None else arguments.only.split(",")
    if unknown := sorted(set(names) - set(WEIGHTS)):
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(WEIGHTS)}")
    machine = describe_machine()
    if arguments.commit:
        machine["commit"] = arguments.commit
    if not machine["gpus"] and not arguments.dry_run:
        parser.error("nvidia-smi finds no GPU; --dry-run tries everything on CPU")
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out
        if out is None:
            gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpus"][0].split(",")[0].lower()) if machine["gpus"] else "dry-run"
            out = Path(scratch) / "dry-run" if arguments.dry_run else ROOT / "bench" / "results" / f"gpu-{gpu.strip('-')}"
        out.parent.mkdir(parents=True, exist_ok=True)
        return Run(arguments, [name for name in WEIGHTS if name in names], machine, out.absolute()).run()


class Run:
    """One command's run, and its result as far as it has come."""

    def __init__(self, arguments: argparse.Namespace, names: Sequence[str], machine: dict[str, Any], out: Path) -> None:
        self._arguments = arguments
        self._names = names
        self._out = out
        self._rows = out.with_name(f"{out.name}.rows.jsonl")  # what an end by force leaves
        self._rows.unlink(missing_ok=True)
        self._end = time.monotonic() + arguments.minutes * 60 - RESERVE
        self._result: dict[str, Any] = {
            "schema": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]]),
            "dry_run": arguments.dry_run,
            "machine": machine,
            "sections": {name: {"outcome": "left out", "seconds": 0.0} for name in WEIGHTS if name not in names},
            "rows": [],
        }

    def run(self) -> int:
        """The exit status: 1 if tests are red, or anything was wrong or failed."""
        status = 0
        for index, name in enumerate(self._names):
            weights = [WEIGHTS[each] for each in self._names[index:]]
            seconds = max(0.0, self._end - time.monotonic()) * weights[0] / sum(weights)
            print(f"-- {name}, up to {seconds:.0f} s", flush=True)
            began = time.monotonic()
            code = self._child(self._command(name, seconds), seconds + GRACE)
            outcome = "done" if code == 0 else "out of time" if code is None else f"failed with status {code}"
            if name == "tests":
                outcome = "passed" if code == 0 else outcome
            self._result["sections"][name] = {"outcome": outcome, "seconds": time.monotonic() - began}
            if name == "tests" and code != 0:
                print(f"bench.gpu: the GPU tests did not pass ({outcome}); nothing is measured", file=sys.stderr)
                return 1
            status |= code not in (0, None)
            self._write()
        for row in report.failures(self._result["rows"]):
            print(f"bench.gpu: {report.name(row)}: {row['status']}", file=sys.stderr)
            status = 1
        print(self._path("md").read_text())
        self._rows.unlink(missing_ok=True)
        return status

    def _command(self, name: str, seconds: float) -> list[str]:
        dry_run = self._arguments.dry_run
        if name == "tests":
            # without the project's own options: a GPU machine may lack plugins that they speak of
            command = [sys.executable, "-m", "pytest", "-q", *test_files(ROOT / "tests")]
            command += ["-p", "bench.gpu.selection", "-p", "no:cacheprovider"]
            command += ["-o", "addopts=", "-o", "filterwarnings=default", "--features", str(self._path("features.json"))]
            if dry_run:
                command.append("--collect-only")
            elif importlib.util.find_spec("xdist") is not None:
                command += ["-n", str(TEST_WORKERS)]
            return command
        command = [sys.executable, "-m", "bench.gpu.section", name, "--rows", str(self._rows), "--seconds", f"{seconds:.0f}"]
        command += ["--toy"] if dry_run else []
        return command + (["--demo", str(self._arguments.demo)] if self._arguments.demo else [])

    def _child(self, command: list[str], limit: float) -> int | None:
        """Its exit status; None if it was ended for want of time. Whatever it started is ended with it."""
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
        try:
            return child.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _write(self) -> None:
        if self._rows.exists():
            self._result["rows"] = read_rows(self._rows)
        self._path("json").write_text(json.dumps(self._result, indent=1) + "\n")
        self._path("md").write_text(report.as_markdown(self._result))

    def _path(self, ending: str) -> Path:
        return self._out.with_name(f"{self._out.name}.{ending}")


def test_files(tests: Path) -> list[str]:
    """Those that may have something for a GPU; which of their tests do is `bench.gpu.selection`'s matter."""
    return [
        str(path)
        for path in sorted(tests.rglob("test_*.py"))
        if path.parent == tests / "kernels" or "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as far as they were written whole."""
    rows = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # cut short by the end of its process
            rows.append(json.loads(line))
    return rows


if __name__ == "__main__":
    sys.exit(main())
