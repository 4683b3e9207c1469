"""The section `kernels`: every op, checked and then timed, over the shapes of `bench.ops`.

Cases that a mark is set for come first, so that running out of time costs the others.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.timing import Ceilings, measure, measure_ceilings
from bench.ops import (
    activation,
    attention,
    layer_norm,
    linear,
    norm,
    quant_matmul,
    quantize_rows,
    rope,
    rotate,
    sampling,
    scaled_matmul,
    varlen_attention,
)
from bench.ops.case import Case, Job, Place, find_place

Row = dict[str, Any]
Emit = Callable[[Row], None]
FAMILIES = (
    attention.decode_jobs,
    attention.prefill_jobs,
    norm.jobs,
    layer_norm.jobs,
    rope.jobs,
    activation.jobs,
    varlen_attention.jobs,
    rotate.jobs,
    sampling.jobs,
    linear.jobs,
    linear.invariant_jobs,
    quant_matmul.jobs,
    quantize_rows.jobs,
    scaled_matmul.jobs,
)


def run(emit: Emit, *, deadline: float, toy: bool) -> None:
    """Measure all ops until `deadline`, of `time.monotonic`. For `toy`, `bench.ops.interpreter` is to be switched on before."""
    place = find_place(toy=toy)
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = measure_ceilings(place)
        emit({"section": "ceilings", "copy_bytes_per_second": ceilings.copy, "matmul_flops": ceilings.matmul})
        jobs = [job for family in FAMILIES for job in family(place)]
        for job in sorted(jobs, key=lambda job: not job.marks):
            row = {"section": "kernels", "op": job.op, "model": job.model.name, "shape": job.shape}
            if time.monotonic() > deadline:
                emit(row | {"status": "not measured: out of time"})
                continue
            emit(row | measure_job(job, place, ceilings))
            if place.device.type == "cuda":
                torch.cuda.empty_cache()


def measure_job(job: Job, place: Place, ceilings: Ceilings) -> Row:
    """The figures of a case, or a `status` that says why there are none."""
    try:
        case = job.build()
        error = case.verify()
        if not error <= case.tolerance:
            return {"status": f"wrong: relative error {error:.2g}", "error": error}
        timing = measure(case.calls, place)
    except torch.OutOfMemoryError:
        return {"status": "not measured: out of memory"}
    except Exception as failure:  # whatever a kernel dies of, the others' figures are not lost with it
        return {"status": f"failed: {_first_line(failure)}"}
    libraries, refusals = measure_libraries(case, place)
    return figures(job, case, ceilings, timing.microseconds, libraries) | {
        "status": "ok",
        "error": error,
        "spread": timing.spread,
        "timing": timing.method,
        "refusals": refusals,
    }


def measure_libraries(case: Case, place: Place) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds of each library call that takes the case, and what the others said."""
    times, refusals = {}, {}
    for name, calls in case.libraries.items():
        try:
            times[name] = measure(calls, place).microseconds
        except Exception as refusal:  # libraries say no in many ways
            refusals[name] = _first_line(refusal)
    return times, refusals


def figures(job: Job, case: Case, ceilings: Ceilings, microseconds: float, libraries: dict[str, float]) -> Row:
    """What follows from a call's time. `fraction` is the time that the ceiling in the way allows, over the measured one."""
    seconds = microseconds / 1e6
    by_bytes, by_flops = case.bytes_moved / ceilings.copy, case.flops / ceilings.matmul
    row: Row = {
        "us": microseconds,
        "bytes": case.bytes_moved,
        "flops": case.flops,
        "rate": case.bytes_moved / seconds if by_bytes >= by_flops else case.flops / seconds,
        "unit": "TB/s" if by_bytes >= by_flops else "TFLOP/s",
        "fraction": max(by_bytes, by_flops) / seconds,
        "libraries_us": libraries,
        "ratios": {name: each / microseconds for name, each in libraries.items()},
    }
    measured = {"fraction": row["fraction"], **row["ratios"]}
    row["marks"] = [
        {
            "what": mark.what,
            "measured": measured.get(mark.figure),
            "met": mark.figure in measured and measured[mark.figure] >= mark.least,
        }
        for mark in job.marks
    ]
    return row


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
