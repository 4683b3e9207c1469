import math
from collections import Counter

import numpy as np
import pytest
import torch

from dashinfer.protocol.fields import MAX_BIASES
from dashinfer.types import Chunk, Enter, SamplingParams
from dashinfer.worker.executor import LaunchedStep, enter_slot
from dashinfer_kernels import SamplingBatch, SamplingState
from dashinfer_kernels import sample as sample_op

pytestmark = pytest.mark.feature("Sampling", "Temperature, cuts, penalties, biases")

VOCAB_SIZE = 1500


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "seed": 1, "temperature": 1.0, **changes})


def run(state: SamplingState, logits: torch.Tensor, chunks: list[Chunk]):
    """Tokens, log-probabilities and failed rows."""
    slots = [chunk.slot for chunk in chunks]
    batch = SamplingBatch.build(state, slots, [chunk.start + chunk.length for chunk in chunks])
    result = LaunchedStep(0, [state.needs[slot].top_logprobs for slot in slots], sample_op(logits, state, batch)).result()
    return result.tokens, result.logprobs, result.failed


def sample(logits: torch.Tensor, each: list[SamplingParams], prompts: list[list[int]] | None = None, outputs=None):
    """Sample one token for each row, with the row's prompt and earlier output in its slot."""
    slots = SamplingState(len(each), 64, logits.shape[-1])
    chunks = []
    for slot, one in enumerate(each):
        prompt = prompts[slot] if prompts else [0]
        tokens = prompt + (outputs[slot] if outputs else [])
        enter_slot(slots, Enter(slot, np.array(tokens, dtype="<i4").tobytes(), len(prompt), one))
        chunks.append(Chunk(slot, len(tokens) - 1, 1, True, ()))
    tokens, logprobs, failed = run(slots, logits.clone(), chunks)
    assert failed == []
    return tokens, logprobs


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(8, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


def test_temperature_zero_takes_the_likeliest(logits):
    tokens, _ = sample(logits, [params(temperature=0.0)] * 8)

    assert tokens == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_neighbours(logits):
    each = [
        params(seed=1),
        params(seed=2, temperature=0.0),
        params(seed=3, top_k=20),
        params(seed=4, top_p=0.9),
        params(seed=5, min_p=0.1, top_k=3),
        params(seed=6, top_p=0.999),
        params(seed=7, repetition_penalty=1.3, logprobs=2),
        params(seed=8, temperature=1.7, presence_penalty=0.5),
    ]
    together, _ = sample(logits, each)
    alone = [sample(logits[row : row + 1], [one])[0][0] for row, one in enumerate(each)]

    assert together == alone


@pytest.mark.feature("Sampling", "Choices, seeds, stops, lengths")
def test_the_seed_and_the_position_decide_the_draw(logits):
    row = logits[:1]
    first = sample(row, [params(seed=5)])[0]

    assert sample(row, [params(seed=5)])[0] == first
    assert len({sample(row, [params(seed=seed)])[0][0] for seed in range(20)}) > 1
    assert len({sample(row, [params(seed=5)], prompts=[[0] * length])[0][0] for length in range(1, 20)}) > 1


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 4000
    tokens, _ = sample(probabilities.log().expand(count, -1), [params(seed=seed) for seed in range(count)])
    counts = Counter(tokens)

    assert counts[4] == 0
    for token, probability in enumerate(probabilities.tolist()):
        deviation = math.sqrt(count * probability * (1 - probability))
        assert abs(counts[token] - count * probability) <= 4 * deviation


def kept(logits: torch.Tensor, one: SamplingParams, draws: int = 600) -> set[int]:
    """Every token that `draws` draws bring."""
    each = [SamplingParams(**{**{f: getattr(one, f) for f in one.__struct_fields__}, "seed": seed}) for seed in range(draws)]
    return set(sample(logits.expand(draws, -1), each)[0])


def expected(logits: torch.Tensor, one: SamplingParams) -> set[int]:
    """The tokens that may be drawn, the slow way."""
    probabilities = (logits.double() / one.temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    if one.top_k:
        order = order[: one.top_k]
    mass = sum(float(probabilities[token]) for token in order)
    allowed, before = set(), 0.0
    for token in order:
        if before < one.top_p * mass and probabilities[token] >= one.min_p * probabilities.max():
            allowed.add(token)
        before += float(probabilities[token])
    return allowed


@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"top_k": 10, "top_p": 0.7},
        {"top_k": 10, "min_p": 0.2},
        {"top_p": 0.8, "min_p": 0.1, "temperature": 1.5},
        {"top_k": 10**9, "top_p": 0.3},
        {"top_p": 1e-9},
    ],
)
def test_cuts_leave_what_they_should(logits, cuts):
    one = params(**cuts)
    allowed = expected(logits[0], one)
    drawn = kept(logits[0], one)

    assert drawn <= allowed
    assert logits[0].argmax().item() in drawn
    if len(allowed) <= 5:
        assert drawn == allowed


def test_top_p_looks_beyond_the_first_candidates():
    flat = torch.zeros(VOCAB_SIZE)
    flat[0] = 0.1

    assert len(kept(flat, params(top_p=0.9), draws=1200)) > 512


def test_ties_are_kept_together():
    tied = torch.tensor([2.0, 2.0, 2.0, 0.0])

    assert kept(tied, params(top_k=2), draws=200) == {0, 1, 2}


def test_penalties():
    one = params(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    slots = SamplingState(1, 16, 5)
    enter_slot(slots, Enter(0, np.array([0, 1, 2, 2], dtype="<i4").tobytes(), 2, one))

    # repetition halves 0, doubles -2 and takes 2 below 0.5 together with presence and frequency, as it was produced twice
    assert run(slots, torch.tensor([[0.98, -0.1, 2.49, -0.15, -1.0]]), [Chunk(0, 3, 1, True, ())])[0] == [0]
    assert run(slots, torch.tensor([[-0.06, -0.1, 2.6, -0.15, -1.0]]), [Chunk(0, 4, 1, True, ())])[0] == [2]


def test_penalties_do_not_touch_the_token_being_planned():
    """The slot's row may hold stale tokens of an earlier sequence beyond the current length."""
    slots = SamplingState(1, 16, 4)
    one = params(temperature=0.0, presence_penalty=2.0)
    enter_slot(slots, Enter(0, np.array([0, 3, 3, 3], dtype="<i4").tobytes(), 1, one))
    enter_slot(slots, Enter(0, np.array([0, 1], dtype="<i4").tobytes(), 1, one))
    tokens, _, _ = run(slots, torch.tensor([[0.0, 1.0, 0.0, 1.5]]), [Chunk(0, 1, 1, True, ())])

    assert tokens == [3]


def test_logit_bias_bans_and_forces(logits):
    best = logits[0].argmax().item()
    tokens, _ = sample(
        logits[:2], [params(temperature=0.0, logit_bias={best: -100.0}), params(temperature=0.0, logit_bias={7: 100.0})]
    )

    assert tokens[0] == logits[0].topk(2).indices[1].item()
    assert tokens[1] == 7


@pytest.mark.feature("Sampling", "Choices, seeds, stops, lengths")
def test_stop_tokens_wait_for_min_tokens():
    row = torch.tensor([[0.0, 5.0, 1.0]])
    one = params(temperature=0.0, min_tokens=2, stop_token_ids=(1,))

    assert sample(row, [one], outputs=[[]])[0] == [2]
    assert sample(row, [one], outputs=[[2]])[0] == [2]
    assert sample(row, [one], outputs=[[2, 2]])[0] == [1]


@pytest.mark.feature("Sampling", "Log-probabilities")
def test_logprobs_are_those_of_the_model(logits):
    each = [params(temperature=0.0), params(temperature=0.5, logprobs=3, logit_bias={3: 50.0}), params(logprobs=0)]
    tokens, logprobs = sample(logits[:3], each)
    line = logits[1].log_softmax(-1)

    assert sorted(logprobs) == [1, 2]
    assert tokens[1] == 3
    assert logprobs[1].chosen == pytest.approx(line[3].item(), abs=1e-5)
    assert logprobs[1].top_tokens == tuple(line.topk(3).indices.tolist())
    assert logprobs[1].top_logprobs == pytest.approx(line.topk(3).values.tolist(), abs=1e-5)
    assert logprobs[2].top_tokens == ()


@pytest.mark.parametrize(
    "extreme",
    [
        {"top_p": 1e-46},
        {"top_p": 1e-46, "top_k": 5},
        {"temperature": 1e-40},
        {"temperature": 5e-38},
        {"temperature": 1e-5},
        {"temperature": 1e-5, "top_p": 1e-46, "top_k": 3, "min_p": 1.0},
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_at_the_edge_of_the_numbers_the_likeliest_is_taken(logits, extreme, scale):
    tokens, _ = sample(logits * scale, [params(**extreme)] * 8)

    assert tokens == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_repetition_penalty_near_zero_repeats(logits, temperature):
    prompt = logits[0].topk(3).indices.tolist()
    one = params(repetition_penalty=1e-38, temperature=temperature, top_p=0.9)
    drawn = {sample(logits[:1], [one], prompts=[prompt])[0][0] for _ in range(5)}

    assert drawn <= set(prompt)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_finite_logits_fails_alone(logits, value, temperature):
    each = [params(seed=seed, temperature=temperature, top_k=40, top_p=0.5, min_p=0.01, logprobs=1) for seed in range(3)]
    expected, expected_logprobs = sample(logits[:3], each)
    broken = logits[:3].clone()
    broken[1, 7] = value
    slots = SamplingState(3, 64, VOCAB_SIZE)
    for slot, one in enumerate(each):
        enter_slot(slots, Enter(slot, bytes(4), 1, one))
    tokens, logprobs, failed = run(slots, broken, [Chunk(slot, 0, 1, True, ()) for slot in range(3)])

    assert failed == [1]
    assert 0 <= tokens[1] < VOCAB_SIZE
    assert (tokens[0], tokens[2]) == (expected[0], expected[2])
    assert logprobs == {row: expected_logprobs[row] for row in (0, 2)}


def test_a_row_of_nothing_but_minus_infinity_fails():
    slots = SamplingState(1, 16, 6)
    enter_slot(slots, Enter(0, bytes(4), 1, params(top_p=0.5)))

    assert run(slots, torch.full((1, 6), float("-inf")), [Chunk(0, 0, 1, True, ())])[2] == [0]


def test_stop_tokens_beyond_the_vocabulary_are_dropped():
    row = torch.tensor([[0.0, 5.0, 1.0]])

    assert sample(row, [params(temperature=0.0, min_tokens=2, stop_token_ids=(1, 3, 100_000, -1))])[0] == [2]


def test_a_slot_has_room_for_all_that_a_request_may_ask_for():
    stops = tuple(range(300))  # of a request at most 256; the model's own come on top
    one = params(temperature=0.0, min_tokens=1, stop_token_ids=stops, logit_bias=dict.fromkeys(range(MAX_BIASES), 1.0))

    assert sample(torch.zeros(1, VOCAB_SIZE), [one])[0] == [300]
