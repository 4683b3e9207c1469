"""Draws results over concurrency: output tokens/s or images/s, time to first token, time per output token. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window, no state, no display needed

from dashinfer.bench.measure import Run
from dashinfer.bench.stats import median_figures

RATES = {"tokens_per_second": "output tokens/s", "requests_per_second": "images/s"}
PANELS = (
    ("time to first token, ms", "ttft_p50", "ttft_p99", 1000),
    ("time per output token, ms", "tpot_p50", "tpot_p99", 1000),
)


def draw(runs: Sequence[Run], path: Path, rate: str = "tokens_per_second") -> None:
    """Writes an image of the kind that `path`'s suffix names. Lines are medians; a band reaches up to the 99th percentile."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = ((RATES[rate], rate, None, 1), *PANELS)
    axes = figure.subplots(1, len(panels))
    for axis, (title, name, upper, scale) in zip(axes, panels, strict=True):
        for run in runs:
            medians = {concurrency: median_figures(rounds) for concurrency, rounds in run.levels.items()}
            known = [(at, figures) for at, figures in medians.items() if getattr(figures, name) is not None]
            across = [at for at, _ in known]
            middle = [getattr(figures, name) * scale for _, figures in known]
            axis.plot(across, middle, marker="o", label=run.target.label)
            if upper is not None:
                axis.fill_between(across, middle, [getattr(figures, upper) * scale for _, figures in known], alpha=0.15)
        axis.set_title(title)
        axis.set_xlabel("concurrent requests")
        axis.set_xscale("log", base=2)
        levels = list(runs[0].levels)
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)
