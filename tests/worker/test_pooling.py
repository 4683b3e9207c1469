"""Embeddings are pooled hidden states, however a prompt is computed."""

from array import array

import pytest
import torch

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.types import Chunk, Enter, SamplingParams, StepPlan
from dashinfer.worker.runner import Runner

from .toy import PaddedGraphs, greedy, load, prompt

pytestmark = pytest.mark.feature("Endpoints", "Embeddings")


@pytest.fixture(scope="module", params=["plain", "graphs"])
def runner(request: pytest.FixtureRequest) -> Runner:
    loaded = load()
    if request.param == "graphs":
        loaded._executor.use_graphs(PaddedGraphs)
    return loaded


def hidden_states(runner: Runner, tokens: list[int]) -> torch.Tensor:
    """[tokens, hidden] of a prompt computed at once."""
    model = runner._executor._model
    found = []
    forward = model.forward

    def record(*arguments, **named):
        found.append(forward(*arguments, **named))
        return found[-1]

    model.forward = record
    try:
        blocks = tuple(range(-(-len(tokens) // 8)))
        enter = Enter(0, array("i", tokens).tobytes(), len(tokens), SamplingParams(max_tokens=1, seed=0))
        runner.execute(StepPlan(0, [enter], [Chunk(0, 0, len(tokens), False, blocks)]))
    finally:
        del model.forward
    return found[0].float()


def embed(runner: Runner, sequences: list[Sequence], **sizes: int) -> Scheduler:
    scheduler = Scheduler(**{"num_blocks": 24, "block_size": 8, "max_batch": 3, "max_step_tokens": 512, **sizes})
    for sequence in sequences:
        scheduler.add(sequence)
    steps: list = []
    while True:
        while len(steps) < 2 and (plan := scheduler.schedule()) is not None:
            steps.append(runner.launch(plan))
        if not steps:
            return scheduler
        scheduler.apply(runner.result(steps.pop(0)))


def asking(length: int, pooling: str | None, seed: int = 0, max_tokens: int = 1) -> Sequence:
    return Sequence(length, prompt(length, seed), greedy(max_tokens, pooling=pooling))


@pytest.mark.parametrize("step_tokens", [3, 7, 512])
def test_mean_and_last(runner, step_tokens):
    asks = [asking(length, pooling, seed=length) for length in (1, 9, 30) for pooling in ("mean", "last")]
    others = [asking(20, None, seed=7, max_tokens=6), asking(30, "mean", seed=30), asking(5, None, seed=5)]
    embed(runner, [*others[:1], *asks, *others[1:]], max_step_tokens=step_tokens)

    for each in [*asks, others[1]]:
        states = hidden_states(runner, each.tokens[: each.prompt_length])
        expected = states.mean(0) if each.params.pooling == "mean" else states[-1]
        assert array("f", each.embedding).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert [each.embedding for each in (others[0], others[2])] == [None, None]


def test_a_last_token_needs_no_others_and_a_mean_does(runner):
    asks = [asking(30, None), asking(30, "last"), asking(30, "mean"), asking(30, "last")]
    embed(runner, asks, max_batch=1)

    assert [each.cached_tokens for each in asks] == [0, 24, 0, 24]
    assert array("f", asks[1].embedding).tolist() == pytest.approx(array("f", asks[3].embedding).tolist(), abs=1e-5)


def test_a_preempted_mean_begins_again(runner):
    growing = [asking(4, None, seed=seed, max_tokens=30) for seed in (1, 2)]
    ask = asking(30, "mean", seed=3)
    scheduler = embed(runner, [*growing, ask], num_blocks=9, max_step_tokens=3)

    assert scheduler.preemptions > 0
    expected = hidden_states(runner, ask.tokens[:30]).mean(0)
    assert array("f", ask.embedding).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
