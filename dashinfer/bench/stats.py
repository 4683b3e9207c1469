"""Figures of requests: percentiles of one round, medians over rounds. Pure; knows nothing of HTTP or of clocks."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

PERCENTILES = (50.0, 90.0, 99.0)  # always there, whatever others are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one request did. Times are in seconds on one monotonic clock.

    Attributes:
        started: just before the request was sent.
        first: when the first piece of text arrived; None if there was none.
        last: when the latest piece of text arrived.
        finished: when the answer was complete, or had failed.
        output_tokens: from the server's `usage`, or else the number of chunks with text.
        counted_by_usage: whether `output_tokens` is the server's own count.
        prompt_tokens, cached_tokens: from `usage`, None where the server does not say.
        gaps: seconds between pieces of text that came one after the other; 0 between pieces that were read together.
        due: when it was to be sent; None in a closed loop.
        wanted_tokens: how long the answer was to be.
        error: one line, or None for a complete answer.
    """

    started: float
    finished: float
    first: float | None = None
    last: float | None = None
    output_tokens: int = 0
    counted_by_usage: bool = False
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    gaps: tuple[float, ...] = ()
    due: float | None = None
    wanted_tokens: int | None = None
    text: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first text."""
        return None if self.first is None else self.first - self.started

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for answers of less than two tokens."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """Seconds from sending to the end of the answer."""
        return self.finished - self.started

    @property
    def late(self) -> float | None:
        """Seconds from when it was due to when it was sent: waiting for a free place, and connecting."""
        return None if self.due is None else self.started - self.due

    def keeps_to(self, marks: Mapping[str, float]) -> bool:
        """Whether no time is longer than its mark, in seconds by name (`ttft`, `tpot`, `itl`, `e2e`).

        A time that the answer is too short for keeps to any mark; of gaps between pieces the mean counts.
        """
        mean_gap = statistics.fmean(self.gaps) if self.gaps else None
        times = {"ttft": self.ttft, "tpot": self.tpot, "itl": mean_gap, "e2e": self.e2e}
        return all((times[name] or 0.0) <= mark for name, mark in marks.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One round, or the medians of several. Times in seconds; None where no request gave the figure.

    Attributes:
        good_requests: those that kept to all marks; None where none are set.
        goodput: of these, per second.
        times: by names such as `ttft_p50` and `ttft_mean`.
    """

    requests: int
    errors: int
    requests_per_second: float
    tokens_per_second: float
    prompt_tokens_per_second: float | None
    output_tokens: float | None  # mean an answer
    wanted_tokens: float | None  # mean an answer
    prompt_tokens: float | None  # mean
    cached_tokens: float | None  # mean
    good_requests: int | None = None
    goodput: float | None = None
    times: dict[str, float | None] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All figures side by side."""
        rest = asdict(self)
        times = rest.pop("times")
        return rest | times


_SUMMED = ("requests", "errors", "good_requests")


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile with linear interpolation between the two nearest ranks.

    Raises:
        ValueError: no values, or `percent` outside of 0 to 100.
    """
    if not values:
        raise ValueError("no values")
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is not between 0 and 100")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _or_none(reduce: Callable[[Sequence[float]], float], values: Iterable[float | None]) -> float | None:
    present = _present(values)
    return reduce(present) if present else None


def summarise(
    samples: Sequence[Sample],
    percentiles: Iterable[float] = (),
    marks: Mapping[str, float] | None = None,
    metrics: Iterable[str] = ("ttft", "tpot", "itl", "e2e"),
) -> Figures:
    """The figures of one round.

    Requests and tokens per second count complete answers alone, over the time from the first request sent to the last answer's
    end. Gaps between pieces (`itl`) of all answers are taken together.

    Args:
        percentiles: from 0 to 100, beside `PERCENTILES`.
        marks: seconds by name of a time, for `Sample.keeps_to`.
        metrics: names of the times.
    """
    assert samples, "a round has requests"
    good = [sample for sample in samples if sample.error is None]
    wall = max(sample.finished for sample in samples) - min(sample.started for sample in samples)

    def per_second(count: float) -> float:
        return count / wall if wall > 0 else 0.0

    times: dict[str, float | None] = {}
    for name in metrics:
        if name == "itl":
            values = sorted(gap for sample in good for gap in sample.gaps)
        else:
            values = sorted(_present(getattr(sample, name) for sample in good))
        times[f"{name}_mean"] = _or_none(statistics.fmean, values)
        for percent in sorted({*PERCENTILES, *percentiles}):
            times[f"{name}_p{percent:g}"] = percentile(values, percent) if values else None
    prompt_tokens = _present(sample.prompt_tokens for sample in good)
    kept = sum(sample.keeps_to(marks) for sample in good) if marks else None
    return Figures(
        requests=len(samples),
        errors=len(samples) - len(good),
        requests_per_second=per_second(len(good)),
        tokens_per_second=per_second(sum(sample.output_tokens for sample in good)),
        prompt_tokens_per_second=per_second(sum(prompt_tokens)) if prompt_tokens else None,
        output_tokens=_or_none(statistics.fmean, [sample.output_tokens for sample in good]),
        wanted_tokens=_or_none(statistics.fmean, [sample.wanted_tokens for sample in good]),
        prompt_tokens=_or_none(statistics.fmean, prompt_tokens),
        cached_tokens=_or_none(statistics.fmean, [sample.cached_tokens for sample in good]),
        good_requests=kept,
        goodput=None if kept is None else per_second(kept),
        times=times,
    )


def median_figures(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over rounds; requests and errors are summed."""
    assert rounds, "there is at least one round"
    merged: dict[str, Any] = {}
    for name in (each.name for each in fields(Figures) if each.name != "times"):
        values = [getattr(figures, name) for figures in rounds]
        merged[name] = _or_none(sum if name in _SUMMED else statistics.median, values)
    names = dict.fromkeys(name for figures in rounds for name in figures.times)
    times = {name: _or_none(statistics.median, [figures.times.get(name) for figures in rounds]) for name in names}
    return Figures(**merged, times=times)


def median_ratio(rounds: Sequence[Figures], baseline: Sequence[Figures], rate: str = "tokens_per_second") -> float | None:
    """Median over rounds of the ratio of a rate, each round against the baseline's in the same round.

    Rounds of two servers lie next to each other in time, so a ratio within a round sees the same noise on both sides. None
    where the baseline got nothing done. A round that only one of them has, since the other was interrupted, is left out.
    """
    pairs = [(getattr(a, rate), getattr(b, rate)) for a, b in zip(rounds, baseline, strict=False)]
    return _or_none(statistics.median, [ours / theirs if theirs else None for ours, theirs in pairs])
