"""The GPU bench: its command on CPU, what it refuses, and how figures come about."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import demo, engine, quantized, report, timing
from bench.gpu.idle import measure_idle, read_trace
from bench.gpu.kernels import figures, measure_job
from bench.gpu.timing import Ceilings
from bench.gpu.workload import client_figures
from bench.machine import describe_machine
from bench.ops import attention, quant_matmul, rope
from bench.ops.case import COPY_MARK, TOY, Case, Job, Mark, Place, poisoned, relative_error
from dashinfer.worker.runner import BLOCK_SIZE

ROOT = Path(__file__).parents[2]
OPS = {
    "decode_attention",
    "prefill_attention",
    "rms_norm",
    "add_rms_norm",
    "add_layer_norm",
    "rope_kv_write",
    "rotate_heads",
    "silu_mul",
    "varlen_attention",
    "sampling",
    "linear",
    "invariant_linear",
    *(f"quant_matmul {mode}" for mode in quant_matmul.MODES),
    "a8w8_matmul",
    "fp8_matmul",
    "quantize_rows",
    "add_rms_norm_int8",
    "silu_mul_int8",
}
PLACE = Place(torch.device("cpu"), torch.float32, 0, toy=True)
CEILINGS = Ceilings(copy=1e12, matmul=1e14)


def case(error: float = 0.0, **changes: Any) -> Case:
    return Case(**{"calls": [lambda: None], "verify": lambda: error, "bytes_moved": 10**6} | changes)


def job(build: Any, *marks: Mark) -> Job:
    return Job("op", TOY[0], "shape", build, marks)


def test_a_dry_run_goes_through_everything(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"DASHINFER_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "run.json").read_text())
    outcomes = {name: each["outcome"] for name, each in found["sections"].items()}
    assert outcomes == {"tests": "passed"} | dict.fromkeys(("kernels", "engine", "peer", "quantized", "vlm", "demo"), "done")
    kernels = report.of(found["rows"], "kernels")
    assert {row["op"] for row in kernels} == OPS
    assert {row["status"] for row in kernels} == {"ok"}
    for section in ("engine", "peer", "vlm"):
        assert [row["status"] for row in report.of(found["rows"], section) if "batch" in row] == ["ok", "ok"]
    modes = [row for row in report.of(found["rows"], "quantized") if "batch" in row]
    assert [(row["quant_type"], row["status"]) for row in modes] == [(mode, "ok") for mode in quantized.MODES for _ in range(2)]
    weights = {row["quant_type"]: row["weight_bytes"] for row in modes}
    (plain,) = {row["weight_bytes"] for row in report.of(found["rows"], "engine") if "batch" in row}
    assert weights["a16w4"] < weights["a16w8"] < plain
    written = (tmp_path / "run.md").read_text()
    assert "the figures mean nothing" in written
    assert "| a16w4 | 1 | 0.00 |" in written
    assert not (tmp_path / "run.rows.jsonl").exists()


class FakeRun(command.Run):
    """Children are what `scripts` say, by section; with `rows` in place of the path of the rows."""

    def __init__(self, out: Path, scripts: dict[str, str], minutes: float = 1.0) -> None:
        arguments = argparse.Namespace(dry_run=True, minutes=minutes, demo=None)
        super().__init__(arguments, list(scripts), describe_machine(), out)
        self._scripts = scripts

    def _command(self, name: str, seconds: float) -> list[str]:
        return [sys.executable, "-c", f"rows = {str(self._rows)!r}\n{self._scripts[name]}"]


def test_nothing_is_measured_when_tests_are_red(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(tmp_path / "run", {"tests": "raise SystemExit(1)", "kernels": "open(rows, 'w').write('{}')"})

    assert run.run() == 1

    assert "the GPU tests did not pass" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_section_that_takes_too_long_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE", 0.0)
    row = {"section": "engine", "batch": 1, "status": "not measured: out of memory"}
    slow = f"import time; open(rows, 'w').write({json.dumps(row)!r} + '\\n{{cut'); time.sleep(600)"
    run = FakeRun(tmp_path / "run", {"engine": slow}, minutes=(command.RESERVE + 2) / 60)

    assert run.run() == 0

    found = json.loads((tmp_path / "run.json").read_text())
    assert found["sections"]["engine"]["outcome"] == "out of time"
    assert found["rows"] == [row]


def test_a_section_that_dies_does_not_end_the_run(tmp_path: Path) -> None:
    row = {"section": "demo", "status": "not measured: the demo model's file is not there"}
    later = f"open(rows, 'w').write({json.dumps(row)!r} + '\\n')"
    run = FakeRun(tmp_path / "run", {"kernels": f"import os; os.kill(os.getpid(), {signal.SIGSEGV:d})", "demo": later})

    assert run.run() == 1

    found = json.loads((tmp_path / "run.json").read_text())
    assert found["sections"]["kernels"]["outcome"] == "failed with status -11"
    assert found["rows"] == [row]


def test_without_a_gpu_only_a_dry_run_starts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "describe_machine", lambda: describe_machine() | {"gpus": []})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["bench.gpu"])

    with pytest.raises(SystemExit, match="2"):
        command.main()

    assert "nvidia-smi finds no GPU" in capsys.readouterr().err


# -- cases


@pytest.mark.parametrize(
    ("build", "status"),
    [
        (lambda: case(error=0.5), "wrong: relative error 0.5"),
        (lambda: case(error=float("nan")), "wrong: relative error nan"),
        (lambda: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_a_case_that_is_wrong_has_no_figures(build: Any, status: str) -> None:
    row = measure_job(job(build), PLACE, CEILINGS)

    assert row["status"] == status
    assert "us" not in row
    assert report.failures([{"section": "kernels", **row}])


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_library_call_that_refuses_is_left_out(kind: type[Exception]) -> None:
    def refuse() -> None:
        raise kind("no such head size\nand more")

    row = measure_job(job(lambda: case(libraries={"a": [refuse], "b": [lambda: None]})), PLACE, CEILINGS)

    assert list(row["ratios"]) == ["b"]
    assert row["refusals"] == {"a": f"{kind.__name__}: no such head size"}


def test_figures_follow_from_the_ceiling_in_the_way() -> None:
    marks = (COPY_MARK, Mark("faster than lib", "lib", 1.0), Mark("faster than what refused", "other", 1.0))
    memory = figures(job(None, *marks), case(), CEILINGS, 1.25, {"lib": 1.0})
    compute = figures(job(None), case(flops=10**9), CEILINGS, 20.0, {})

    assert (memory["unit"], memory["fraction"], memory["rate"]) == ("TB/s", pytest.approx(0.8), pytest.approx(8e11))
    assert [mark["met"] for mark in memory["marks"]] == [False, False, False]
    assert [mark["measured"] for mark in memory["marks"]] == [pytest.approx(0.8), pytest.approx(0.8), None]
    assert (compute["unit"], compute["fraction"], compute["rate"]) == ("TFLOP/s", pytest.approx(0.5), pytest.approx(5e13))


def test_what_is_not_finite_or_not_written_is_an_error() -> None:
    with poisoned():
        unwritten = torch.empty(3)

    assert relative_error(torch.ones(3), torch.ones(3)) == 0
    assert relative_error(unwritten, torch.ones(3)) == float("inf")


def test_caches_are_measured_at_the_block_size_of_the_engine() -> None:
    assert BLOCK_SIZE["cuda"] == attention.BLOCK_SIZE == rope.BLOCK_SIZE


@dataclass
class FakeGraph:
    calls: int

    def replay(self) -> None: ...


@pytest.mark.parametrize(("microseconds", "count"), [(5.0, 255), (300.0, 6), (5000.0, 3)])
def test_a_replay_is_long_enough_to_time(microseconds: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_capture", lambda calls: FakeGraph(len(calls)))
    monkeypatch.setattr(timing, "_elapsed", lambda replay: replay.__self__.calls * microseconds / 1e6)

    replay, calls, method = timing._prepare([lambda: None] * 3)

    assert (replay.__self__.calls, calls, method) == (count, count, "graph")


# -- figures


def test_idle_time_is_what_no_activity_covers(tmp_path: Path) -> None:
    events = [(0.0, 90.0), (50.0, 100.0), (100.0, 400.0), (405.0, 700.0), (600.0, 650.0), (800.0, 1000.0)]
    trace = [{"cat": "kernel", "ts": begin, "dur": end - begin} for begin, end in events]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": [*trace, {"cat": "cuda_runtime", "ts": 700.0, "dur": 100.0}, {"ph": "M"}]}))

    idle = measure_idle(read_trace(path))

    assert idle is not None
    assert idle.any == pytest.approx(105 / 900)  # the first tenth does not count
    assert idle.waiting == pytest.approx(100 / 900)
    assert measure_idle([]) is None


def test_clients_figures() -> None:
    figures = client_figures([[1.0, 2.0, 3.0], [1.5, 3.5, 5.5]])

    assert figures["ttft_p50_ms"] == 1250
    assert figures["ttft_max_ms"] == 1500
    assert figures["tpot_p50_ms"] == 1500
    assert figures["tokens_per_second"] == 6 / 5.5


def test_the_engine_is_compared_with_its_peer_at_the_same_batch() -> None:
    engine = [{"section": "engine", "batch": batch, "status": "ok", "tokens_per_second": 100.0} for batch in (1, 256)]
    peer = [
        {"section": "peer", "batch": 1, "status": "not measured: out of time"},
        {"section": "peer", "batch": 256, "status": "ok", "tokens_per_second": 25.0},
    ]

    found = report.compare_with_peer([*engine, *peer])

    assert [(row["batch"], row["ratio"]) for row in found] == [(256, 4.0)]
    assert found[0]["marks"][0]["met"] is False


def test_a_mode_that_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def measure(emit: Any, workload: Any, *, quant_type: str, **_: Any) -> None:
        if quant_type == "fp8":
            raise RuntimeError("no float8 here\nand more")
        if quant_type == "a16w8":
            os.kill(os.getpid(), signal.SIGKILL)
        emit({"section": "engine", "batch": 1, "status": "ok", "marks": [{}]})

    monkeypatch.setattr(engine, "measure", measure)
    rows: list[dict[str, Any]] = []
    quantized.run(lambda row: print(json.dumps(row), flush=True) or rows.append(row), deadline=time.monotonic() + 60, toy=True)

    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    about = [(row["quant_type"], row["status"]) for row in told]
    assert about == [
        ("a16w4", "ok"),
        ("fp8", "failed: RuntimeError: no float8 here"),
        ("a16w8", "failed with status -9"),
        ("a8w8", "ok"),
    ]
    assert {row["section"] for row in told} == {"quantized"}
    assert told[0]["marks"] == []


def test_modes_that_time_runs_out_for_are_told(capfd: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = []

    quantized.run(rows.append, deadline=time.monotonic() - 1, toy=True)

    assert [report.name(row) for row in rows] == [f"quantized, {mode}" for mode in quantized.MODES]
    assert {row["status"] for row in rows} == {"not measured: out of time"}


def test_quantised_weights_are_set_beside_those_of_16_bits() -> None:
    about = {"section": "quantized", "quant_type": "fp8"}
    figures = dict.fromkeys(("ttft_p50_ms", "ttft_max_ms", "tpot_p50_ms", "tpot_max_ms", "floor_ms"), 1.0)
    rows = [
        {"section": "engine", "batch": 64, "status": "ok", "tokens_per_second": 100.0} | figures,
        about | {"load_seconds": 1.0},
        about | {"batch": 1, "status": "not measured: out of time"},
        about | {"batch": 64, "status": "ok", "weight_bytes": 2**33, "tokens_per_second": 150.0} | figures,
    ]

    lines = report._quantized(rows)

    assert lines[-3].startswith("| fp8 | 1 | not measured: out of time |")
    assert lines[-2].startswith("| fp8 | 64 | 8.00 | 150 | 1.50x |")
    assert report.compare_with_peer(rows) == []


def test_answers_are_compared_token_by_token() -> None:
    reference = [{"tokens": ["a", "b", "c"]}, {"tokens": ["a", "b"]}, {"tokens": ["a"]}]

    found = demo.compare(reference, [["a", "x", "c"], ["a", "b"], []])

    assert found == {"answers": 3, "equal": 1, "common_tokens": [1, 2, 0]}


def test_the_reference_has_an_answer_to_every_prompt() -> None:
    stored = json.loads(demo.REFERENCE.read_text())

    assert [each["prompt"] for each in stored["answers"]] == list(demo.PROMPTS)
    assert "".join(stored["answers"][0]["tokens"]) == "The capital of France is Paris."
