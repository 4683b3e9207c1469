"""The executor driven by the scheduler's plans: whatever a sequence goes through, it gets the tokens that it gets alone."""

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
import torch

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.types import SamplingParams, TokenLogprobs
from dashinfer.worker.runner import Runner
from tests.worker.toy import PaddedGraphs, load, prompt

Request = tuple[tuple[int, ...], SamplingParams]


@pytest.fixture(scope="module", params=["plain", "graphs"])
def runner(request: pytest.FixtureRequest):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load()
    if request.param == "graphs":
        loaded._executor.use_graphs(PaddedGraphs)
    yield loaded
    torch.set_num_threads(threads)


@dataclass
class Run:
    """What came of some requests.

    Attributes:
        tokens: of each request, up to its end or its abort.
        logprobs: of each token of each request.
    """

    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs | None]] = field(default_factory=list)
    preemptions: int = 0
    cached: int = 0
    aborted: int = 0


def drive(runner: Runner, requests: list[Request], chance: random.Random | None = None, **sizes: int) -> Run:
    """Two steps are launched at any time, as the engine does. With `chance`, requests arrive and are aborted at any step."""
    scheduler = Scheduler(**{"num_blocks": 24, "block_size": 8, "max_batch": 3, "max_step_tokens": 512, **sizes})
    sequences = [Sequence(len(tokens), list(tokens), params) for tokens, params in requests]
    logprobs: dict[Sequence, list[TokenLogprobs | None]] = {sequence: [] for sequence in sequences}
    coming = deque(sequences)
    steps: deque = deque()
    aborted = 0
    while True:
        while coming and (chance is None or chance.random() < 0.4):
            scheduler.add(coming.popleft())
        if chance is not None and chance.random() < 0.05:
            sequence = chance.choice(sequences)
            if sequence not in coming and not sequence.ended:
                scheduler.abort(sequence)
                aborted += 1
        while len(steps) < 2 and (plan := scheduler.schedule()) is not None:
            steps.append(runner.launch(plan))
        if steps:
            for update in scheduler.apply(steps.popleft().result()):
                assert not update.failed
                logprobs[update.sequence].append(update.logprobs)
        elif not coming:
            break
    assert scheduler.pool.num_used == 0
    return Run(
        [sequence.tokens[sequence.prompt_length :] for sequence in sequences],
        list(logprobs.values()),
        scheduler.preemptions,
        sum(sequence.cached_tokens for sequence in sequences),
        aborted,
    )


def some_requests(chance: random.Random, count: int) -> list[Request]:
    """Of every kind; prompts begin alike."""
    common = prompt(40, 0)
    requests = []
    for number in range(count):
        shared = chance.choice([0, 3, 8, 17])
        tokens = common[:shared] + prompt(chance.randint(1, 9), 100 + number)
        params = SamplingParams(
            max_tokens=chance.choice([1, 12, 20, 30]),
            seed=number,
            temperature=chance.choice([0.0, 0.0, 0.7, 1.5]),
            top_k=chance.choice([0, 0, 12]),
            top_p=chance.choice([1.0, 0.9]),
            frequency_penalty=chance.choice([0.0, 0.0, 1.5]),
            repetition_penalty=chance.choice([1.0, 1.0, 1.3]),
            logit_bias=chance.choice([{}, {}, {5: 4.0, 200: -3.0}]),
            min_tokens=chance.choice([0, 6]),
            stop_token_ids=tuple(range(number, 211, 20)) if chance.random() < 0.3 else (),
            logprobs=chance.choice([None, None, 0, 3]),
        )
        requests.append((tuple(tokens), params))
    return requests


def assert_as_alone(runner: Runner, run: Run, requests: list[Request]) -> None:
    for (tokens, params), got, logprobs in zip(requests, run.tokens, run.logprobs, strict=True):
        alone = drive(runner, [(tokens, params)])
        assert got == alone.tokens[0][: len(got)]
        for one, other in zip(logprobs, alone.logprobs[0], strict=False):
            assert (one is None) == (params.logprobs is None)
            if one is not None and other is not None:
                assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
                assert len(one.top_tokens) == params.logprobs
                assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)
                assert one.top_tokens == other.top_tokens


@pytest.mark.feature("Parallelism and recovery", "Continuous batching, prefix cache, preemption")
def test_random_arrivals_aborts_preemptions_and_cached_prefixes_change_no_token(runner):
    runs = []
    for seed in range(8):
        chance = random.Random(seed)
        requests = some_requests(chance, 10)
        run = drive(
            runner, requests, chance, num_blocks=chance.choice([7, 8, 24]), max_step_tokens=chance.choice([3, 9, 30, 512])
        )
        assert_as_alone(runner, run, requests)
        runs.append(run)

    assert runner._executor._graphs is None or runner._executor._graphs.calls > 50
    assert sum(run.preemptions for run in runs) > 10
    assert sum(run.cached for run in runs) > 100
    assert sum(run.aborted for run in runs) > 5


def test_preempted_sequences_get_the_same_tokens_from_a_quantised_cache():
    quantised = load(kv_cache_dtype="int8")
    requests = [(tuple(prompt(9, seed)), SamplingParams(max_tokens=20, seed=seed, temperature=0.0)) for seed in range(4)]

    run = drive(quantised, requests, num_blocks=8)

    assert run.preemptions > 0
    assert run.tokens == [drive(quantised, [request]).tokens[0] for request in requests]


def test_a_chunk_that_samples_nothing_may_be_all_of_a_step(runner):
    requests = [(tuple(prompt(30, 1)), SamplingParams(max_tokens=4, seed=0, temperature=0.0))]

    assert drive(runner, requests, max_step_tokens=7).tokens == drive(runner, requests).tokens
