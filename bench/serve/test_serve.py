"""The pytest benchmark harness: measures a running server and holds what its figures must be worth.

    python -m pytest bench/serve --url http://127.0.0.1:8000/v1 [--peer-url URL --peer-model NAME --least-ratio 1:1.5,16:2.5]

Everything is measured once, then each test reads the outcome; a table closes the report.
"""

import pytest

from bench.serve.conftest import Outcome
from dashinfer.bench.stats import median_figures, median_ratio


def test_every_request_is_answered(outcome: Outcome, concurrency: int) -> None:
    for run in outcome.runs:
        figures = median_figures(run.levels[concurrency])

        assert figures.errors == 0, run.errors


def test_prompts_and_answers_have_the_length_asked_for(outcome: Outcome, concurrency: int) -> None:
    figures = median_figures(outcome.runs[0].levels[concurrency])

    assert figures.output_tokens == outcome.settings.output_tokens
    assert figures.prompt_tokens == pytest.approx(outcome.settings.prompt_tokens, abs=2)


def test_the_prefix_cache_did_not_answer(outcome: Outcome, concurrency: int) -> None:
    figures = median_figures(outcome.runs[0].levels[concurrency])

    assert (figures.cached_tokens or 0) < outcome.settings.prompt_tokens / 2, "measure a freshly started server"


def test_more_requests_at_once_get_more_tokens_out(outcome: Outcome) -> None:
    levels = outcome.runs[0].levels
    if len(levels) < 2:
        pytest.skip("one concurrency alone was measured")
    speed = {concurrency: median_figures(rounds).tokens_per_second for concurrency, rounds in levels.items()}

    assert speed[max(speed)] > speed[min(speed)]


def test_outruns_the_peer(outcome: Outcome, at: int, least_ratio: float) -> None:
    server, peer = outcome.runs

    assert median_ratio(server.levels[at], peer.levels[at]) >= least_ratio
