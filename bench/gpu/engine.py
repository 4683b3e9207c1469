"""The section `engine`: scheduler and runner on a model of random weights, beside the floor that memory sets."""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gpu.idle import Idle, measure_idle, read_trace
from bench.gpu.inprocess import InProcess
from bench.gpu.timing import measure_ceilings
from bench.gpu.workload import Workload, client_figures, make_workload
from bench.ops.case import find_place
from dashinfer.engine.scheduler import Update
from dashinfer.engine.sequence import Sequence
from dashinfer.models.config import ModelConfig
from dashinfer.types import QuantType, SamplingParams, StepPlan

Row = dict[str, Any]
PROFILED_STEPS = 20
TPOT_MOST = 1.25  # times the floor, at batch 1
IDLE_MOST = 0.05  # at batch 256


def run(emit: Callable[[Row], None], *, deadline: float, toy: bool) -> None:
    """Measure every batch until `deadline`, of `time.monotonic`."""
    measure(emit, make_workload(toy=toy), deadline=deadline, toy=toy)


def measure(
    emit: Callable[[Row], None],
    workload: Workload,
    *,
    deadline: float,
    toy: bool,
    quant_type: QuantType | None = None,
    profiled: bool = True,
) -> None:
    """Load the workload's model, its weights rounded as `quant_type` says, and measure every batch until `deadline`; idle time
    if `profiled`."""
    place = find_place(toy=toy)
    with torch.inference_mode():
        copy = measure_ceilings(place).copy
    if not toy:
        torch.cuda.empty_cache()
    started = time.monotonic()
    engine = InProcess.load(
        workload.config,
        device="cpu" if toy else "cuda",
        data_type="float32" if toy else "bfloat16",
        max_batch=max(workload.batches),
        max_length=workload.prompt_tokens + workload.output_tokens + 48,
        quant_type=quant_type,
    )
    gc.collect()
    gc.freeze()
    emit({"section": "engine", "load_seconds": time.monotonic() - started, "blocks": engine.runner.ready.num_blocks})
    Session(engine, replace(workload, output_tokens=2), min(8, max(workload.batches))).run()  # compiles what long prefills need
    for batch in workload.batches:
        if time.monotonic() > deadline:
            emit({"section": "engine", "batch": batch, "status": "not measured: out of time"})
            continue
        Session(engine, replace(workload, prompt_tokens=10, output_tokens=4), batch).run()  # compiles what decoding needs
        session = Session(engine, workload, batch)
        session.run()
        emit(row(session, None if toy or not profiled else profile(engine, workload, batch), copy))


def profile(engine: InProcess, workload: Workload, batch: int) -> Idle | None:
    """Idle time in a session that lasts as long as is needed for `PROFILED_STEPS` steps in which all sequences decode."""
    room = engine.runner.ready.max_step_tokens - batch  # for prompts, in a step
    prefills = -(-batch * workload.prompt_tokens // room)
    output_tokens = min(prefills + PROFILED_STEPS + 5, workload.output_tokens)
    session = Session(engine, replace(workload, output_tokens=output_tokens), batch, trace=True)
    session.run()
    return session.idle


class Session:
    """One batch, sent all at once and answered.

    Args:
        trace: what the device does in `PROFILED_STEPS` steps in which all sequences decode; times are then not worth reading.
    """

    def __init__(self, engine: InProcess, workload: Workload, batch: int, *, trace: bool = False) -> None:
        self.engine = engine
        self.workload = workload
        self.batch = batch
        self.idle: Idle | None = None
        self.steps: list[float] = []  # seconds of each step in which all sequences decode
        self._params = SamplingParams(max_tokens=workload.output_tokens, seed=0, temperature=0.0)
        self._times: dict[Sequence, list[float]] = {}
        self._before = 0.0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if trace else None
        self._decoding = 0  # plans launched in which all sequences decode

    def run(self) -> None:
        scheduler = self.engine.new_scheduler()
        for prompt in self.workload.prompts(self.batch):
            sequence = Sequence(len(prompt), list(prompt), self._params)
            self._times[sequence] = []
            scheduler.add(sequence)
        self._began = self._before = time.perf_counter()
        self.engine.run(scheduler, self._on_step, self._on_launch)
        assert scheduler.preemptions == 0

    @property
    def times(self) -> list[list[float]]:
        return list(self._times.values())

    def _all_decode(self, plan: StepPlan) -> bool:
        return len(plan.chunks) == self.batch and all(chunk.length == 1 for chunk in plan.chunks)

    def _on_launch(self, plan: StepPlan) -> None:
        if self._profiler is None or not self._all_decode(plan):
            return
        self._decoding += 1
        if self._decoding == 1:
            torch.cuda.synchronize()
            self._profiler.start()
        elif self._decoding == 1 + PROFILED_STEPS:
            torch.cuda.synchronize()
            self._profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self._profiler.export_chrome_trace(str(path))
                self.idle = measure_idle(read_trace(path))
            self._profiler = None

    def _on_step(self, plan: StepPlan, updates: list[Update]) -> None:
        now = time.perf_counter()
        if self._all_decode(plan):
            self.steps.append(now - self._before)
        self._before = now
        for update in updates:
            assert not update.failed
            self._times[update.sequence].append(now - self._began)


def row(session: Session, idle: Idle | None, copy: float) -> Row:
    """Figures of one batch. `copy` in bytes a second."""
    figures = client_figures(session.times)
    floor = floor_seconds(session.engine, session.workload, session.batch, copy) * 1e3
    found: Row = {"section": "engine", "batch": session.batch, "status": "ok", **figures, "floor_ms": floor}
    found["weight_bytes"] = session.engine.runner.ready.weight_bytes
    found["tpot_over_floor"] = figures["tpot_p50_ms"] / floor
    found["step_p50_ms"] = statistics.median(session.steps) * 1e3 if session.steps else None
    found["idle"] = None if idle is None else idle.any
    found["idle_waiting"] = None if idle is None else idle.waiting
    found["marks"] = []
    if session.batch == 1:
        ratio = found["tpot_over_floor"]
        found["marks"].append({"what": "TPOT <= 1.25x the floor", "measured": ratio, "met": ratio <= TPOT_MOST})
    if session.batch == 256:
        waiting = found["idle_waiting"]
        met = waiting is not None and waiting < IDLE_MOST
        found["marks"].append({"what": "GPU idle < 5% between steps", "measured": waiting, "met": met})
    return found


def floor_seconds(engine: InProcess, workload: Workload, batch: int, copy: float) -> float:
    """What reading the KV cache at its mean length and all weights takes, but the embedding: a step takes a few rows of it."""
    model: ModelConfig = engine.model
    weights = engine.runner.ready.weight_bytes
    item = {"float32": 4}.get(engine.runner.ready.data_type, 2)
    if not model.tie_word_embeddings:
        weights -= model.vocab_size * model.hidden_size * item
    context = workload.prompt_tokens + workload.output_tokens / 2
    kv = batch * context * model.num_layers * 2 * model.num_kv_heads * model.head_dim * item
    return (weights + kv) / copy
