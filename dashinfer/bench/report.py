"""Results for people and for programs: a table, Markdown, JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from dashinfer.bench.measure import Run, Settings
from dashinfer.bench.stats import Figures, median_figures, median_ratio

RATES = {"tokens_per_second": "tok/s", "requests_per_second": "images/s"}
COLUMNS = (
    "server",
    "conc.",
    "tok/s",
    "ratio",
    "TTFT p50 / p90 / p99, ms",
    "TPOT p50 / p90 / p99, ms",
    "tokens in (cached) / out",
    "errors",
)


def as_json(
    runs: Sequence[Run], settings: Settings, baseline: str | None, machine: dict[str, Any], extra: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Everything, as one JSON object; `extra` adds fields to a target by its label. Times in seconds, memory in bytes."""
    return {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": asdict(settings),
        "baseline": baseline,
        "machine": machine,
        "targets": [
            {
                "label": run.target.label,
                "url": run.target.url,
                "model": run.target.model,
                "body": run.target.body,
                "dialect": run.dialect,
                "answer": run.answer,
                "errors": run.errors,
                **extra.get(run.target.label, {}),
                "levels": [
                    {
                        "concurrency": concurrency,
                        "ratio": ratio_at(run, runs, baseline, concurrency, settings.rate),
                        "median": asdict(median_figures(rounds)),
                        "rounds": [asdict(figures) for figures in rounds],
                    }
                    for concurrency, rounds in run.levels.items()
                ],
            }
            for run in runs
        ],
    }


def ratio_at(
    run: Run, runs: Sequence[Run], baseline: str | None, concurrency: int, rate: str = "tokens_per_second"
) -> float | None:
    """A rate over the baseline's; None for the baseline itself and where there is none."""
    other = next((candidate for candidate in runs if candidate.target.label == baseline), None)
    if other is None or other is run:
        return None
    return median_ratio(run.levels[concurrency], other.levels[concurrency], rate)


def _milliseconds(*seconds: float | None) -> str:
    return " / ".join(
        "-" if value is None else f"{value * 1000:.1f}" if value < 0.1 else f"{value * 1000:.0f}" for value in seconds
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def columns(rate: str) -> tuple[str, ...]:
    """`COLUMNS` with the rate that servers are compared by."""
    return tuple(RATES[rate] if name == "tok/s" else name for name in COLUMNS)


def rows(runs: Sequence[Run], baseline: str | None, rate: str = "tokens_per_second") -> list[tuple[str, ...]]:
    """The table's rows, `COLUMNS` wide, by concurrency and then by target."""
    result = []
    for concurrency in runs[0].levels:
        for run in runs:
            figures = median_figures(run.levels[concurrency])
            ratio = ratio_at(run, runs, baseline, concurrency, rate)
            result.append(
                (
                    run.target.label,
                    str(concurrency),
                    f"{getattr(figures, rate):.1f}",
                    "" if ratio is None else f"{ratio:.2f}x",
                    _milliseconds(figures.ttft_p50, figures.ttft_p90, figures.ttft_p99),
                    _milliseconds(figures.tpot_p50, figures.tpot_p90, figures.tpot_p99),
                    f"{_number(figures.prompt_tokens)} ({_number(figures.cached_tokens)}) / {_number(figures.output_tokens)}",
                    str(figures.errors),
                )
            )
    return result


def as_table(runs: Sequence[Run], baseline: str | None, rate: str = "tokens_per_second") -> Table:
    table = Table(*columns(rate))
    labels = len(runs)
    for number, row in enumerate(rows(runs, baseline, rate), start=1):
        table.add_row(*row, end_section=number % labels == 0)
    return table


def as_markdown(
    runs: Sequence[Run],
    settings: Settings,
    baseline: str | None,
    machine: dict[str, Any],
    extra: dict[str, dict[str, Any]],
    command: str,
) -> str:
    """The table, and beneath it what one must know to read it."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    where = machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['cores']} cores"
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    lines = [
        f"{_prompts(settings)}, {settings.output_tokens} tokens out, greedy, streamed; medians of "
        f"{settings.rounds} rounds, servers taking turns in each.",
        "",
        f"{where}; Python {machine['python']}; {versions}; commit {machine['commit']}{changed}.",
        "",
        "| " + " | ".join(columns(settings.rate)) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(runs, baseline, settings.rate)),
        "",
    ]
    if baseline is not None:
        what = "images/s" if settings.images else "output tokens/s"
        lines += [f"`ratio` is {what} over {baseline}'s in the same round.", ""]
    asked = "what a picture of a red circle shows" if settings.images else "the capital of France"
    for run in runs:
        lines.append(f"- {run.target.label} ({run.dialect}): {' '.join(run.answer.split())!r} to {asked}.")
        lines += [f"  {line}" for line in memory_lines(extra.get(run.target.label, {}))]
    lines += ["", "Made with:", "", "```bash", command, "```", ""]
    return "\n".join(lines)


def _prompts(settings: Settings) -> str:
    if not settings.images:
        return f"Prompts of {settings.prompt_tokens} tokens"
    sizes = ", ".join(f"{width}x{height}" for width, height in settings.images)
    return f"A picture ({settings.image_format.upper()}; {sizes} pixels in turn) and a short question a request"


def memory_lines(extra: dict[str, Any]) -> list[str]:
    """Start-up time and memory of one target, for people."""
    lines = []
    if "startup_seconds" in extra:
        lines.append(f"First answer {extra['startup_seconds']:.1f} s after the command.")
    for when in ("start", "end"):
        if (memory := extra.get(f"memory_{when}")) is not None:
            workers = ", ".join(f"{rss / 2**20:.0f}" for rss in memory["workers"]) or "none"
            lines.append(
                f"Resident at the {when}: parent {memory['parent'] / 2**20:.0f} MiB, processes below it {workers} MiB."
            )
    return lines


def caveats(runs: Sequence[Run], settings: Settings) -> list[str]:
    """What makes figures of this run mean less than they seem to."""
    found = []
    for run in runs:
        for concurrency, rounds in run.levels.items():
            figures: Figures = median_figures(rounds)
            where = f"{run.target.label} at {concurrency}"
            if figures.errors:
                found.append(f"{where}: {figures.errors} of {figures.requests} requests failed, such as: {run.errors[0]}")
            if figures.output_tokens is not None and figures.output_tokens < settings.output_tokens * 0.98:
                found.append(f"{where}: answers have {figures.output_tokens:.1f} tokens, not {settings.output_tokens}")
            if figures.prompt_tokens is None:
                found.append(f"{where}: the server does not count tokens; a chunk of text counts as one")
            elif figures.cached_tokens is not None and figures.cached_tokens > figures.prompt_tokens / 2:
                found.append(f"{where}: most of each prompt came from the prefix cache; use another --seed")
    return found
