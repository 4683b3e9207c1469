"""Log-probabilities of prompts' tokens are those that the tokens would have as output."""

import pytest

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.types import SamplingParams, TokenLogprobs
from dashinfer.worker import prompt_scores
from dashinfer.worker.runner import Runner

from .toy import PaddedGraphs, greedy, load, prompt

pytestmark = pytest.mark.feature("Endpoints", "Completions, likelihoods of prompts")

LENGTH = 40


@pytest.fixture(scope="module", params=["plain", "graphs"])
def runner(request: pytest.FixtureRequest) -> Runner:
    loaded = load()
    if request.param == "graphs":
        loaded._executor.use_graphs(PaddedGraphs)
    return loaded


def run(
    runner: Runner, sequences: list[Sequence], **sizes: int
) -> tuple[Scheduler, dict[Sequence, list[TokenLogprobs | None]]]:
    """The log-probabilities of the output, with two steps under way at any time."""
    scheduler = Scheduler(**{"num_blocks": 24, "block_size": 8, "max_batch": 3, "max_step_tokens": 512, **sizes})
    logprobs: dict[Sequence, list[TokenLogprobs | None]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        scheduler.add(sequence)
    steps: list = []
    while True:
        while len(steps) < 2 and (plan := scheduler.schedule()) is not None:
            steps.append(runner.launch(plan))
        if not steps:
            return scheduler, logprobs
        for update in scheduler.apply(steps.pop(0).result()):
            logprobs[update.sequence].append(update.logprobs)


def sequence(tokens: list[int], params: SamplingParams) -> Sequence:
    return Sequence(len(tokens), list(tokens), params)


@pytest.fixture(scope="module")
def expected(runner: Runner) -> tuple[list[int], list[TokenLogprobs]]:
    """A text that goes on from its first token as the model likes best, and the log-probabilities of the rest."""
    writer = sequence(prompt(1, 5), greedy(LENGTH - 1, logprobs=3))
    _, logprobs = run(runner, [writer])
    return writer.tokens, logprobs[writer]


def assert_scored(found: Sequence, expected: tuple[list[int], list[TokenLogprobs]], count: int) -> None:
    assert len(found.prompt_logprobs) == found.prompt_length - 1
    for one, other in zip(found.prompt_logprobs, expected[1], strict=False):
        assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
        assert one.top_tokens == other.top_tokens[:count]
        assert one.top_logprobs == pytest.approx(other.top_logprobs[:count], abs=1e-4)


@pytest.mark.parametrize("step_tokens", [3, 7, 512])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_as_if_they_were_output(runner, expected, monkeypatch, step_tokens, rows):
    monkeypatch.setattr(prompt_scores, "ROWS", rows)
    tokens, _ = expected
    asks = [sequence(tokens[:length], greedy(2, prompt_logprobs=count)) for length, count in ((LENGTH, 3), (17, 0), (1, 2))]
    others = [sequence(tokens[:9], greedy(5)), sequence(tokens[:33], greedy(3, logprobs=1))]
    _, logprobs = run(runner, [asks[0], others[0], asks[1], others[1], asks[2]], max_step_tokens=step_tokens)

    for each, count in zip(asks, (3, 0, 2), strict=True):
        assert_scored(each, expected, count)
    assert all(each.prompt_logprobs == [] for each in others)
    assert others[0].tokens == tokens[:14]
    assert logprobs[others[1]][0].chosen == pytest.approx(expected[1][32].chosen, abs=1e-4)


def test_nothing_is_taken_from_the_prefix_cache(runner, expected):
    tokens, _ = expected
    first = sequence(tokens, greedy(1))
    again = sequence(tokens, greedy(1, prompt_logprobs=1))
    shares = sequence(tokens, greedy(1))
    run(runner, [first, again, shares], max_batch=1)

    assert_scored(again, expected, 1)
    assert (again.cached_tokens, shares.cached_tokens) == (0, 32)


def test_a_preemption_gives_nothing_twice(runner, expected):
    tokens, _ = expected
    asks = [sequence(tokens[:20], greedy(20, prompt_logprobs=2)) for _ in range(3)]
    scheduler, _ = run(runner, asks, num_blocks=9, max_step_tokens=8)

    assert scheduler.preemptions > 0
    for each in asks:
        assert_scored(each, expected, 2)
        assert each.tokens == tokens[:40]
