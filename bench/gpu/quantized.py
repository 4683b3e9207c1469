"""The section `quantized`: the engine section's model and prompts with the weights rounded in each mode.

A process a mode, forked before CUDA is touched: each has all of the device's memory.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.gpu import engine
from bench.gpu.workload import Workload, make_workload
from dashinfer.types import QuantType

Row = dict[str, Any]
Emit = Callable[[Row], None]
MODES: tuple[QuantType, ...] = ("a16w4", "fp8", "a16w8", "a8w8")  # gptq's layers are those of a16w4 or a16w8
BATCHES = (1, 64)
FORK = multiprocessing.get_context("fork")


def run(emit: Emit, *, deadline: float, toy: bool) -> None:
    """Measure one mode after the other until `deadline`, of `time.monotonic`."""
    workload = make_workload(toy=toy)
    if not toy:
        workload = replace(workload, batches=BATCHES)
    for mode in MODES:
        about: Row = {"section": "quantized", "quant_type": mode}
        if time.monotonic() > deadline:
            emit(about | {"status": "not measured: out of time"})
            continue
        child = FORK.Process(target=measure_mode, args=(emit, workload, mode), kwargs={"deadline": deadline, "toy": toy})
        child.start()
        child.join(max(0.0, deadline - time.monotonic()))
        if child.is_alive():
            child.kill()
            child.join()
            emit(about | {"status": "not measured: out of time"})
        elif child.exitcode != 0:
            emit(about | {"status": f"failed with status {child.exitcode}"})


def measure_mode(emit: Emit, workload: Workload, mode: QuantType, *, deadline: float, toy: bool) -> None:
    """The rows of one mode; a failure is one of them."""
    about: Row = {"section": "quantized", "quant_type": mode}
    try:
        engine.measure(
            lambda row: emit(row | about | {"marks": []}),
            workload,
            deadline=deadline,
            toy=toy,
            quant_type=mode,
            profiled=False,
        )
    except Exception as failure:  # whatever a mode dies of, the others' figures are not lost with it
        emit(about | {"status": f"failed: {type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"[:200]})
