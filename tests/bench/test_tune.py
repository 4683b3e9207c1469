"""Tuning: which candidate wins, and what the table then says."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu.timing import Timing
from bench.ops.case import TOY, Case, Job, Place
from bench.tune import search, table
from bench.tune.search import Found, group_by_key, looked_up
from bench.tune.spaces import SPACES, Space, grid
from dashinfer_kernels import tuning

ROOT = Path(__file__).parents[2]
PLACE = Place(torch.device("cpu"), torch.float32, 0, toy=True)
TIMES = {None: 10.0, 1: 12.0, 2: 5.0, 3: 1.0, 4: 7.0}  # microseconds by the looked up config


def config() -> int | None:
    found = tuning.lookup("op", (7,))
    return None if found is None else found["n"]


def build() -> Case:
    return Case(calls=[config], verify=lambda: 1.0 if config() == 3 else 0.0, bytes_moved=1)


def space(*numbers: int) -> Space:
    return Space("op", lambda place: [], grid(n=numbers))


JOBS = [Job("op", TOY[0], str(index), build) for index in range(5)]


@pytest.fixture(autouse=True)
def _timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "measure", lambda calls, *rest: Timing(TIMES[calls[0]()], 0.0, "clock"))


def run(*numbers: int, seconds: float = 60.0) -> Found:
    deadline = time.monotonic() + seconds
    return search.search(space(*numbers), PLACE, (7,), JOBS[:2], deadline=deadline, report=lambda line: None)


def test_the_fastest_candidate_that_computes_the_same_wins() -> None:
    assert run(1, 2, 3, 4) == Found("op", (7,), {"n": 2}, 2.0, tried=4, refused=1)


def test_the_heuristic_stays_where_nothing_is_faster() -> None:
    assert run(1).config is None


def test_the_search_ends_in_time() -> None:
    assert run(1, 2, seconds=-1).tried == 0


def test_cases_share_the_key_that_the_op_asks_for() -> None:
    groups = group_by_key(space(), JOBS)

    assert groups == {(7,): JOBS[: search.CASES_A_KEY]}


def test_lookups_are_as_before_afterwards() -> None:
    before = tuning.lookup
    with looked_up("op", {"n": 1}) as asked:
        assert config() == 1
        assert tuning.lookup("another", (1,)) is None

    assert asked == {(7,)}
    assert tuning.lookup is before


def test_a_table_is_what_the_ops_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    table.write(path, [Found("b", (2, "x"), {"n": 1}, 1.5, 3, 0), Found("a", (1,), {"n": 9}, 1.1, 3, 0)])
    table.write(path, [Found("b", (3, "x"), {"n": 2}, 1.2, 3, 0), Found("a", (1,), None, 1.0, 3, 0)])
    table.write(path, [Found("b", (2, "x"), {"n": 4}, 1.7, 3, 0)])
    monkeypatch.setattr(tuning, "config_path", lambda name: path)
    tuning._table.cache_clear()

    assert tuning._table("gpu") == {"b": {(2, "x"): {"n": 4}, (3, "x"): {"n": 2}}}
    assert [entry["gain"] for entry in json.loads(path.read_text())["b"]] == [1.7, 1.2]

    tuning._table.cache_clear()


def test_a_dry_run_reaches_the_op() -> None:
    names = ("rms_norm", "gated", "scaled_linear", "quantize_rows", "quantized_rms_norm", "quantized_gated")
    names += ("invariant_linear", "sampling")
    result = subprocess.run(
        [sys.executable, "-m", "bench.tune", "--dry-run", *(f"--op={name}" for name in names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert "rms_norm (64,)" in result.stdout
    assert "gated (96,)" in result.stdout
    assert result.stdout.count("2 tried, 0 refused") == len(names)


def asked_tables(source: str) -> set[str]:
    """The names of ops whose table a module asks."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    asked = [call.args[0] for call in calls if "lookup" in ast.unparse(call.func).split(".")[-1] and call.args]
    return {node.value for name in asked for node in ast.walk(name) if isinstance(node, ast.Constant)}


def test_every_table_that_ops_ask_is_written() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(tuning.__file__).parent.rglob("*.py")]

    assert set().union(*map(asked_tables, sources)) == set(SPACES)


def test_candidates_are_all_different() -> None:
    for each in SPACES.values():
        assert len({json.dumps(candidate, sort_keys=True) for candidate in each.candidates}) == len(each.candidates)
