"""What `bench.parallel` found, for people and for programs: `bench.serve`'s tables, and what they say of steps and of kills."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench.parallel.recovery import MARK, Recovery
from dashinfer.bench.measure import Run
from dashinfer.bench.stats import median_figures

COLUMNS = (
    "ranks",
    "step, ms",
    "step overhead, ms",
    "start, s",
    "of it weights, s",
    "SIGKILL to next token, s: median (worst of n)",
    "mark, s",
    "same answers",
)


def step_overhead(run: Run, single: Run) -> tuple[float, float]:
    """Seconds of a step of one sequence, and how many of them are more than a single rank takes on the same cores."""
    least = min(run.levels)
    own, other = (median_figures(each.levels[least]).times["tpot_p50"] for each in (run, single))
    if own is None or other is None:
        return float("nan"), float("nan")
    return own, own - other


def rows(runs: Sequence[Run], recoveries: Sequence[Recovery]) -> list[tuple[str, ...]]:
    """`COLUMNS` wide; the first run is that of the fewest ranks."""
    result = []
    for run, recovery in zip(runs, recoveries, strict=True):
        step, overhead = step_overhead(run, runs[0])
        kills = recovery.kills
        result.append(
            (
                str(recovery.ranks),
                f"{step * 1000:.1f}",
                "" if run is runs[0] else f"{overhead * 1000:+.1f}",
                f"{recovery.start:.2f}",
                f"{recovery.weights:.2f}",
                f"{recovery.median:.2f} ({recovery.worst:.2f} of {len(kills)})" if kills else "-",
                f"{MARK + recovery.weights:.2f}: {'kept' if recovery.holds else 'MISSED'}" if kills else "-",
                f"{sum(kill.same for kill in kills)} of {len(kills)}" if kills else "-",
            )
        )
    return result


def as_markdown(runs: Sequence[Run], recoveries: Sequence[Recovery]) -> str:
    """A section to follow `bench.serve`'s."""
    lines = [
        "## Steps, and ranks that are killed",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(runs, recoveries)),
        "",
        "A step is the median TPOT at the lowest concurrency; its overhead is what it takes longer than with the fewest ranks,",
        "on the same cores. Kills come one after the other, each under one greedy stream; the next token is the one that ends",
        f"the longest silence after it. The mark is {MARK:g} s and what loading the weights takes. Same answers are those of",
        "the same request without a kill.",
        "",
    ]
    return "\n".join(lines)


def as_json(recoveries: Sequence[Recovery]) -> list[dict[str, Any]]:
    """Times in seconds; without kills, nothing holds or fails to."""
    return [{**asdict(each), "mark": MARK + each.weights, "holds": each.holds if each.kills else None} for each in recoveries]
