"""The figures of `dashinfer_bench`, against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashinfer.bench.stats import Figures, Sample, median_figures, median_ratio, percentile, summarise


def sample(started: float, first: float, last: float, tokens: int, **rest: object) -> Sample:
    return Sample(started=started, first=first, last=last, finished=last, output_tokens=tokens, **rest)


def figures(tokens_per_second: float, **rest: object) -> Figures:
    empty = dict.fromkeys(Figures.__dataclass_fields__) | {"times": {}}
    return Figures(**{**empty, "requests": 1, "errors": 0, "tokens_per_second": tokens_per_second, **rest})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentile_agrees_with_numpy(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 100.5)])
def test_percentile_refuses(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match=r"no values|not between"):
        percentile(values, percent)


def test_a_sample_knows_its_times() -> None:
    one = sample(10.0, 10.5, 12.5, 5)

    assert one.ttft == 0.5
    assert one.tpot == 0.5  # four tokens after the first, in two seconds


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_time_per_token_without_a_second_token(tokens: int) -> None:
    assert sample(0.0, 1.0, 1.0, tokens).tpot is None


def test_a_round_counts_tokens_of_complete_answers_over_the_whole_time() -> None:
    samples = [
        sample(0.0, 1.0, 3.0, 11, prompt_tokens=100, cached_tokens=0),
        sample(0.5, 1.0, 4.0, 21, prompt_tokens=104, cached_tokens=8),
        sample(1.0, 2.0, 5.0, 7, error="HTTP 500"),
    ]

    round_ = summarise(samples)

    assert (round_.requests, round_.errors) == (3, 1)
    assert round_.tokens_per_second == pytest.approx(32 / 5)
    assert (round_.prompt_tokens, round_.cached_tokens, round_.output_tokens) == (102, 4, 16)
    assert round_.prompt_tokens_per_second == pytest.approx(204 / 5)
    assert round_.times["ttft_p50"] == pytest.approx(0.75)
    assert round_.times["ttft_mean"] == pytest.approx(0.75)
    assert round_.times["tpot_p50"] == pytest.approx((0.2 + 0.15) / 2)
    assert round_.times["e2e_p50"] == pytest.approx((3.0 + 3.5) / 2)
    assert (round_.good_requests, round_.goodput) == (None, None)


def test_gaps_of_all_answers_are_one_distribution_and_any_percentile_may_be_asked_for() -> None:
    samples = [
        sample(0.0, 1.0, 2.0, 3, gaps=(0.25, 0.75)),
        sample(0.0, 1.0, 2.0, 3, gaps=(0.5,)),
        sample(0.0, 1.0, 2.0, 3, gaps=(99.0,), error="HTTP 500"),
    ]

    times = summarise(samples, percentiles=(0, 99.9)).times

    assert [times[name] for name in ("itl_p0", "itl_p50", "itl_mean")] == [0.25, 0.5, 0.5]
    assert times["itl_p99.9"] == pytest.approx(0.75, abs=1e-3)
    assert {"itl_p90", "itl_p99", "e2e_p99.9"} < set(times)


@pytest.mark.parametrize(
    ("marks", "kept"),
    [
        ({"ttft": 0.5}, 2),
        ({"ttft": 0.4}, 1),
        ({"tpot": 0.2}, 2),  # an answer of one token keeps to it
        ({"itl": 0.3}, 2),  # the mean gap of the second is 0.5
        ({"e2e": 1.5}, 1),
        ({"ttft": 0.5, "e2e": 1.5}, 0),
        ({"ttft": 9, "tpot": 9, "itl": 9, "e2e": 9}, 3),
    ],
)
def test_goodput_counts_requests_that_keep_to_every_mark(marks: dict[str, float], kept: int) -> None:
    samples = [
        sample(0.0, 0.5, 2.5, 11, gaps=(0.2,) * 10),
        sample(0.0, 0.4, 2.4, 5, gaps=(0.25, 0.75)),
        sample(0.0, 1.0, 1.0, 1),
        sample(0.0, 0.1, 4.0, 2, gaps=(0.1,), error="HTTP 500"),
    ]

    round_ = summarise(samples, marks=marks)

    assert round_.good_requests == kept
    assert round_.goodput == pytest.approx(kept / 4)


def test_lateness_is_from_when_a_request_was_due() -> None:
    samples = [sample(1.0, 2.0, 3.0, 2, due=1.0), sample(1.5, 2.0, 3.0, 2, due=1.25)]

    times = summarise(samples, metrics=("ttft", "late")).times

    assert times["late_p50"] == 0.125
    assert "e2e_p50" not in times


def test_a_round_in_which_everything_failed_has_no_figures() -> None:
    round_ = summarise([Sample(started=0.0, finished=0.0, error="ConnectError")])

    assert round_.errors == 1
    assert round_.tokens_per_second == 0
    assert (round_.times["ttft_p99"], round_.times["itl_mean"], round_.prompt_tokens) == (None, None, None)


def test_medians_of_rounds_add_up_requests_and_skip_what_is_missing() -> None:
    rounds = [
        figures(10, times={"ttft_p50": 1.0}, good_requests=1),
        figures(30, times={"ttft_p50": None}, good_requests=1, errors=1),
        figures(20, times={"ttft_p50": 3.0, "tpot_p50": 4.0}, good_requests=0),
    ]

    merged = median_figures(rounds)

    assert (merged.requests, merged.errors, merged.good_requests) == (3, 1, 2)
    assert merged.tokens_per_second == 20
    assert merged.times == {"ttft_p50": 2.0, "tpot_p50": 4.0}
    assert merged.goodput is None
    flat = merged.as_json()
    assert (flat["requests"], flat["ttft_p50"], flat["goodput"], "times" in flat) == (3, 2.0, None, False)


def test_a_ratio_compares_within_rounds() -> None:
    ours = [figures(20), figures(2), figures(30)]
    theirs = [figures(10), figures(1), figures(10)]

    assert median_ratio(ours, theirs) == 2
    assert median_ratio(ours, [figures(0)] * 3) is None
    assert median_ratio(ours, theirs[:1]) == 2  # interrupted
