"""Figures of requests: percentiles of one round, medians over rounds. Pure; knows nothing of HTTP or of clocks."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One round, or the medians of several. Times in seconds; None where no request gave the figure."""

    requests: int
    errors: int
    requests_per_second: float
    tokens_per_second: float
    output_tokens: float | None  # mean an answer
    prompt_tokens: float | None  # mean
    cached_tokens: float | None  # mean
    ttft_p50: float | None
    ttft_p90: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p90: float | None
    tpot_p99: float | None


_SUMMED = ("requests", "errors")


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


def summarise(samples: Sequence[Sample]) -> Figures:
    """The figures of one round.

    Requests and output tokens per second count complete answers alone, over the time from the first request sent to the last
    answer's end.
    """
    assert samples, "a round has requests"
    good = [sample for sample in samples if sample.error is None]
    wall = max(sample.finished for sample in samples) - min(sample.started for sample in samples)
    tokens = sum(sample.output_tokens for sample in good)
    ttft = [sample.ttft for sample in good]
    tpot = [sample.tpot for sample in good]
    return Figures(
        requests=len(samples),
        errors=len(samples) - len(good),
        requests_per_second=len(good) / wall if wall > 0 else 0.0,
        tokens_per_second=tokens / wall if wall > 0 else 0.0,
        output_tokens=_or_none(statistics.fmean, [sample.output_tokens for sample in good]),
        prompt_tokens=_or_none(statistics.fmean, [sample.prompt_tokens for sample in good]),
        cached_tokens=_or_none(statistics.fmean, [sample.cached_tokens for sample in good]),
        **{
            f"{name}_p{percent}": _or_none(lambda values, percent=percent: percentile(values, percent), values)
            for name, values in (("ttft", ttft), ("tpot", tpot))
            for percent in (50, 90, 99)
        },
    )


def median_figures(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over rounds; requests and errors are summed."""
    assert rounds, "there is at least one round"
    merged = {}
    for name in (field.name for field in fields(Figures)):
        values = [getattr(figures, name) for figures in rounds]
        merged[name] = sum(values) if name in _SUMMED else _or_none(statistics.median, values)
    return Figures(**merged)


def median_ratio(rounds: Sequence[Figures], baseline: Sequence[Figures], rate: str = "tokens_per_second") -> float | None:
    """Median over rounds of the ratio of a rate, each round against the baseline's in the same round.

    Rounds of two servers lie next to each other in time, so a ratio within a round sees the same noise on both sides. None
    where the baseline got nothing done.
    """
    pairs = [(getattr(a, rate), getattr(b, rate)) for a, b in zip(rounds, baseline, strict=True)]
    return _or_none(statistics.median, [ours / theirs if theirs else None for ours, theirs in pairs])
