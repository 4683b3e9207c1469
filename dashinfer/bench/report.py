"""Results for people and for programs: tables, Markdown, JSON."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from dashinfer.bench.measure import Run
from dashinfer.bench.settings import Settings
from dashinfer.bench.stats import Figures, Sample, median_figures, median_ratio

Extra = dict[str, dict[str, Any]]  # label -> what is known of a target beyond its figures
Rows = list[tuple[str, ...]]

TIMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E", "late": "sent late"}


def as_json(
    runs: Sequence[Run],
    settings: Settings,
    baseline: str | None,
    machine: dict[str, Any] | None = None,
    extra: Extra | None = None,
    *,
    interrupted: bool = False,
    detailed: bool = False,
) -> dict[str, Any]:
    """Everything, as one JSON object; `extra` adds fields to a target by its label. Times in seconds, memory in bytes.

    Args:
        machine: where it was measured, where that is known.
        detailed: whether rounds have the figures of each request.
    """

    def rounds_of(run: Run, level: float) -> list[dict[str, Any]]:
        rounds = [figures.as_json() for figures in run.levels[level]]
        if detailed:
            for figures, samples in zip(rounds, run.samples[level], strict=True):
                figures["samples"] = [_sample(sample, samples) for sample in samples]
        return rounds

    return {
        "schema": 2,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            **asdict(settings),
            "concurrency": [] if settings.open else settings.concurrency,
            "request_rate": [_finite(rate) for rate in settings.request_rate],
        },
        "interrupted": interrupted,
        "baseline": baseline,
        **({} if machine is None else {"machine": machine}),
        "targets": [
            {
                "label": run.target.label,
                "url": run.target.url,
                "model": run.target.model,
                "body": run.target.body,
                "dialect": run.dialect,
                "answer": run.answer,
                "errors": run.errors,
                **(extra or {}).get(run.target.label, {}),
                "levels": [
                    {
                        "concurrency": None if settings.open else level,
                        "request_rate": _finite(level) if settings.open else None,
                        "ratio": ratio_at(run, runs, baseline, level, settings.rate),
                        "median": median_figures(rounds).as_json(),
                        "rounds": rounds_of(run, level),
                    }
                    for level, rounds in run.levels.items()
                ],
            }
            for run in runs
        ],
    }


def _finite(rate: float) -> float | str:
    return "inf" if math.isinf(rate) else rate  # JSON has no infinity


def _sample(sample: Sample, samples: Sequence[Sample]) -> dict[str, Any]:
    """One request: seconds from the round's first one until it was sent, its times, its tokens, its gaps, its error."""
    began = min(other.started for other in samples)
    times = {name: getattr(sample, name) for name in ("ttft", "tpot", "e2e", "late")}
    counts = {name: getattr(sample, name) for name in ("prompt_tokens", "cached_tokens", "output_tokens", "wanted_tokens")}
    return {"sent": sample.started - began, **times, **counts, "gaps": sample.gaps, "error": sample.error}


def ratio_at(
    run: Run, runs: Sequence[Run], baseline: str | None, level: float, rate: str = "tokens_per_second"
) -> float | None:
    """A rate over the baseline's; None for the baseline itself and where there is none."""
    other = next((candidate for candidate in runs if candidate.target.label == baseline), None)
    if other is None or other is run or level not in other.levels:
        return None
    return median_ratio(run.levels[level], other.levels[level], rate)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:.0f}"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _measured(runs: Sequence[Run], settings: Settings) -> list[tuple[float, Run, Figures]]:
    """By level and then by target, what was measured of it."""
    return [(level, run, median_figures(run.levels[level])) for level in settings.levels for run in runs if level in run.levels]


def _level_name(settings: Settings) -> str:
    return "asked req/s" if settings.open else "conc."


def columns(settings: Settings, baseline: str | None) -> tuple[str, ...]:
    requests = "images/s" if settings.images else "req/s"
    goodput = ("good req/s",) if settings.goodput else ()
    ratio = () if baseline is None else ("ratio",)
    names = (requests, *goodput, "tok/s in", "tok/s", *ratio, "tokens in (cached) / out", "errors")
    return ("server", _level_name(settings), *names)


def rows(runs: Sequence[Run], settings: Settings, baseline: str | None) -> Rows:
    """The table of rates, as wide as `columns`, by level and then by target."""
    result = []
    for level, run, figures in _measured(runs, settings):
        ratio, goodput = (), ()
        if baseline is not None:
            times = ratio_at(run, runs, baseline, level, settings.rate)
            ratio = ("" if times is None else f"{times:.2f}x",)
        if figures.goodput is not None:
            goodput = (f"{figures.goodput:.2f} ({(figures.good_requests or 0) / figures.requests:.0%})",)
        result.append(
            (
                run.target.label,
                f"{level:g}",
                f"{figures.requests_per_second:.2f}",
                *goodput,
                _number(figures.prompt_tokens_per_second, 1),
                f"{figures.tokens_per_second:.1f}",
                *ratio,
                f"{_number(figures.prompt_tokens)} ({_number(figures.cached_tokens)}) / {_number(figures.output_tokens)}",
                str(figures.errors),
            )
        )
    return result


def time_columns(settings: Settings) -> tuple[str, ...]:
    return ("server", _level_name(settings), "ms", "mean", *(f"p{percent:g}" for percent in settings.percentiles))


def time_rows(runs: Sequence[Run], settings: Settings) -> Rows:
    """The table of times in milliseconds, as wide as `time_columns`."""
    names = ("mean", *(f"p{percent:g}" for percent in settings.percentiles))
    return [
        (
            run.target.label,
            f"{level:g}",
            TIMES[metric],
            *(_milliseconds(figures.times.get(f"{metric}_{name}")) for name in names),
        )
        for level, run, figures in _measured(runs, settings)
        for metric in settings.metrics()
    ]


def as_tables(runs: Sequence[Run], settings: Settings, baseline: str | None) -> list[Table]:
    """Rates, then times."""
    return [
        _in_sections(Table(*columns(settings, baseline)), rows(runs, settings, baseline), lambda row: row[1]),
        _in_sections(Table(*time_columns(settings)), time_rows(runs, settings), lambda row: row[:2]),
    ]


def _in_sections(table: Table, content: Rows, section: Callable[[tuple[str, ...]], Any]) -> Table:
    """The table with a line between rows of different sections."""
    for row, following in itertools.zip_longest(content, content[1:]):
        table.add_row(*row, end_section=following is not None and section(row) != section(following))
    return table


def as_markdown(
    runs: Sequence[Run],
    settings: Settings,
    baseline: str | None,
    machine: dict[str, Any] | None,
    extra: Extra,
    command: str,
    *,
    interrupted: bool = False,
) -> str:
    """The tables, and beneath them what one must know to read them."""
    rounds = "one round" if settings.rounds == 1 else f"medians of {settings.rounds} rounds"
    greedy = all("temperature" not in run.target.body for run in runs)
    lines = [
        f"{_load(settings)} {_prompts(settings)}, {'greedy, ' if greedy else ''}streamed; {rounds}"
        f"{', servers taking turns in each' if len(runs) > 1 else ''}.{' Interrupted.' if interrupted else ''}",
        "",
    ]
    if machine is not None:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        where = machine["gpus"][0] if machine["gpus"] else f"{machine['cpu']}, {machine['cores']} cores"
        changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
        lines += [f"{where}; Python {machine['python']}; {versions}; commit {machine['commit']}{changed}.", ""]
    lines += _table(columns(settings, baseline), rows(runs, settings, baseline))
    if settings.goodput:
        marks = ", ".join(f"{TIMES[name]} {seconds * 1000:g} ms" for name, seconds in settings.goodput)
        lines += [f"A good request keeps to: {marks}.", ""]
    if baseline is not None:
        what = "images/s" if settings.images else "output tokens/s"
        lines += [f"`ratio` is {what} over {baseline}'s in the same round.", ""]
    lines += _table(time_columns(settings), time_rows(runs, settings))
    asked = "what a picture of a red circle shows" if settings.images else "the capital of France"
    for run in runs:
        lines.append(f"- {run.target.label} ({run.dialect}): {' '.join(run.answer.split())!r} to {asked}.")
        lines += [f"  {line}" for line in memory_lines(extra.get(run.target.label, {}))]
    lines += ["", "Made with:", "", "```bash", command, "```", ""]
    return "\n".join(lines)


def _table(names: tuple[str, ...], content: Rows) -> list[str]:
    body = ["| " + " | ".join(row) + " |" for row in content]
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *body, ""]


def _load(settings: Settings) -> str:
    if not settings.open:
        return "Closed loop."
    kind = "Poisson arrivals" if settings.arrivals == "poisson" else "Arrivals at constant intervals"
    most = "" if settings.max_concurrency is None else f", at most {settings.max_concurrency} requests under way"
    return f"{kind}{most}."


def _prompts(settings: Settings) -> str:
    about = f" (each {settings.range_ratio:.0%} up or down)" if settings.range_ratio else ""
    out = f"{settings.output_tokens} tokens out{about}"
    if settings.dataset is not None:
        return f"Prompts of {settings.dataset}"
    if settings.images:
        sizes = ", ".join(f"{width}x{height}" for width, height in settings.images)
        return f"A picture ({settings.image_format.upper()}; {sizes} pixels in turn) and a short question a request, {out}"
    shared = ""
    if settings.shared_prefix:
        alike = "the same in all" if settings.prefixes == 1 else f"one of {settings.prefixes} prefixes"
        shared = f", {settings.shared_prefix} of them {alike}"
    return f"Prompts of {settings.prompt_tokens} tokens{shared}, {out}"


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


LATE_SECONDS = 0.1


def caveats(runs: Sequence[Run], settings: Settings) -> list[str]:
    """What makes figures of this run mean less than they seem to."""
    found = []
    for level, run, figures in _measured(runs, settings):
        where = f"{run.target.label} at {level:g}"
        if figures.errors:
            found.append(f"{where}: {figures.errors} of {figures.requests} requests failed, such as: {run.errors[0]}")
        wanted, given = figures.wanted_tokens, figures.output_tokens
        if wanted is not None and given is not None and given < wanted * 0.98:
            found.append(f"{where}: answers have {given:.1f} tokens, not {wanted:.1f}")
        if figures.prompt_tokens is None:
            found.append(f"{where}: the server does not count tokens; a chunk of text counts as one")
        elif (figures.cached_tokens or 0) > figures.prompt_tokens / 2 and not settings.shared_prefix:
            another = "its questions come again" if settings.dataset else "use another --seed"
            found.append(f"{where}: most of each prompt came from the prefix cache; {another}")
        if (late := figures.times.get("late_p99")) is not None and late > LATE_SECONDS:
            cause = "all places were taken, or connecting was slow" if settings.max_concurrency else "connecting was slow"
            found.append(f"{where}: one request in 100 was sent {late * 1000:.0f} ms after it was due or later; {cause}")
    return found
