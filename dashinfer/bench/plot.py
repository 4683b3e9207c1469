"""Draws results over concurrency or request rate: tokens/s or images/s, time to first token, time per output token.

Needs matplotlib.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot: no window, no state, no display needed

from dashinfer.bench.measure import Run
from dashinfer.bench.settings import Settings
from dashinfer.bench.stats import median_figures

RATES = {"tokens_per_second": "output tokens/s", "requests_per_second": "images/s"}
PANELS = (
    ("time to first token, ms", "ttft_p50", "ttft_p99", 1000),
    ("time per output token, ms", "tpot_p50", "tpot_p99", 1000),
)


def draw(runs: Sequence[Run], path: Path, settings: Settings) -> None:
    """Writes an image of the kind that `path`'s suffix names. Lines are medians; a band reaches up to the 99th percentile.

    A request rate without bound has no place on the axis, and is left out.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = ((RATES[settings.rate], settings.rate, None, 1), *PANELS)
    levels = [level for level in settings.levels if not math.isinf(level)]
    axes = figure.subplots(1, len(panels))
    for axis, (title, name, upper, scale) in zip(axes, panels, strict=True):
        drawn = False
        for run in runs:
            medians = {level: median_figures(run.levels[level]).as_json() for level in levels if level in run.levels}
            known = [(at, figures) for at, figures in medians.items() if figures[name] is not None]
            drawn = drawn or bool(known)
            across = [at for at, _ in known]
            middle = [figures[name] * scale for _, figures in known]
            axis.plot(across, middle, marker="o", label=run.target.label)
            if upper is not None:
                axis.fill_between(across, middle, [figures[upper] * scale for _, figures in known], alpha=0.15)
        axis.set_title(title)
        axis.set_xlabel("requests/s asked" if settings.open else "concurrent requests")
        if drawn:  # no scale fits an axis without numbers
            axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [f"{level:g}" for level in levels])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)
