import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dashinfer_kernels import SamplingBatch, SamplingState, sample, warm_up_sampling
from dashinfer_kernels.sampling import launch, reference
from dashinfer_kernels.sampling.state import IN_PROMPT, MAX_COUNT, Needs

pytestmark = pytest.mark.feature("Sampling", "Temperature, cuts, penalties, biases")

VOCAB_SIZE = 4500  # two tiles and a part of one
PROMPT, OUTPUT = [3, 5, 5, 8], [8, 11, 11, 11]
POSITION = len(PROMPT) + len(OUTPUT)
NAN, INF = math.nan, math.inf

CASES = [
    {"temperature": 0.0},
    {"seed": 2**62 + 12345},
    {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 0.3, "presence_penalty": -0.2},
    {"top_k": 7, "seed": -1},
    {"top_p": 0.6},
    {"top_p": 0.97, "temperature": 1.4},
    {"min_p": 0.2},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.05, "temperature": 0.7},
    {"repetition_penalty": 0.5, "presence_penalty": 1.0},
    {"logit_bias": {7: 4.0, 4499: -3.0, 0: 8.0}},
    {"min_tokens": 6, "stop_token_ids": (0, 1, 2, 4000), "logit_bias": {0: 50.0}, "temperature": 0.0},
    {"top_k": 1},
    {"top_p": 1e-9},
    {"logprobs": 3, "temperature": 0.3},
    {"logprobs": 0, "temperature": 0.0},
]


def entered(cases: list[dict], device: str, vocab_size: int = VOCAB_SIZE, outputs: list[list[int]] | None = None):
    """A state with a sequence for each case, and the batch of them all. Slots are in another order than rows."""
    state = SamplingState(len(cases) + 2, 40, vocab_size, device=device, max_edits=8)
    slots = list(range(len(cases), 0, -1))
    positions = []
    for row, (slot, case) in enumerate(zip(slots, cases, strict=True)):
        tokens = PROMPT + (outputs[row] if outputs else OUTPUT)
        state.enter(slot, np.array(tokens, np.int32), len(PROMPT), **{"seed": row, **case})
        positions.append(len(tokens))
    return state, SamplingBatch.build(state, slots, positions)


def distinct(rows: int, vocab_size: int = VOCAB_SIZE, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size) * scale


def agree(logits: Tensor, cases: list[dict], device: str = "cpu", **batch_changes) -> Tensor:
    """Sample by `sample` and by the reference, compare all they return and leave in the state; the tokens."""
    state, batch = entered(cases, device, logits.shape[1])
    other, other_batch = entered(cases, "cpu", logits.shape[1])
    changes = {name: value.to(device) for name, value in batch_changes.items()}
    batch = SamplingBatch(**{**batch.__dict__, **changes})
    actual = sample(logits.clone().to(device), state, batch)
    expected = reference.sample(logits.clone(), other, SamplingBatch(**{**other_batch.__dict__, **batch_changes}))

    assert actual.tokens.tolist() == expected.tokens.tolist()
    assert actual.failed.tolist() == expected.failed.tolist()
    assert torch.equal(state.history.cpu(), other.history)
    assert torch.equal(state.counts.cpu(), other.counts)
    if batch.needs.top_logprobs is not None:
        for row, case in enumerate(cases):
            count = case.get("logprobs")
            if count is not None and not expected.failed[row]:
                torch.testing.assert_close(actual.logprobs[row].cpu(), expected.logprobs[row])
                assert actual.top_tokens[row, :count].tolist() == expected.top_tokens[row, :count].tolist()
                torch.testing.assert_close(actual.top_logprobs[row, :count].cpu(), expected.top_logprobs[row, :count])
    return actual.tokens


@pytest.fixture(params=["cpu", "triton"])
def path(request: pytest.FixtureRequest) -> str:
    """Tests that take it run on the CPU path and on the Triton path; the device."""
    return request.getfixturevalue("triton_path") if request.param == "triton" else "cpu"


def test_philox_gives_the_published_numbers() -> None:
    """Of Random123's known answers, that for a key and a counter of zeros."""
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)

    assert reference.philox(zero, zero).tolist() == [0x6627E8D5]
    assert len({reference.philox(seed, at).item() for seed in (zero, one, one << 32, -one) for at in (zero, one)}) == 8


def test_fractions_are_exact() -> None:
    for total, numerator in [(2**60 - 1, 2**31 - 1), (2**60 - 1, 2**31), (1, 2**31 - 1), (12345678901234567, 987654321)]:
        actual = reference.fraction(torch.tensor(total), torch.tensor(numerator), 31).item()

        assert actual == total * numerator >> 31


def test_every_option_agrees_with_the_reference(path: str) -> None:
    agree(distinct(len(CASES)), CASES, path)


def test_logits_may_have_16_bits(path: str) -> None:
    agree(distinct(3).half(), [{"temperature": 0.0, "logprobs": 2}, {"top_p": 0.9}, {"presence_penalty": 1.0}], path)


def test_a_row_does_not_depend_on_its_neighbours(path: str) -> None:
    logits = distinct(len(CASES))
    together = agree(logits, CASES, path)
    for row in range(5, len(CASES), 4):
        state, batch = entered([{"seed": row, **CASES[row]}], path)

        assert sample(logits[row : row + 1].clone().to(path), state, batch).tokens.item() == together[row]


@pytest.mark.parametrize("tiles", [1, 2])
def test_the_number_of_splits_changes_nothing(triton_path: str, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "tiles_per_split", lambda *_: tiles)
    agree(distinct(3), [{"top_p": 0.9}, {"seed": 5}, {"temperature": 0.0}], triton_path)


def test_greedy_takes_the_lowest_of_the_likeliest(path: str) -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1, [70, 3000, 4499]] = 1.0
    logits[2, [2047, 2048]] = 1.0

    assert agree(logits, [{"temperature": 0.0}] * 3, path).tolist() == [0, 70, 2047]


def test_rows_without_finite_logits_fail_alone(path: str) -> None:
    logits = distinct(6)
    logits[0, 4499] = NAN
    logits[1, 5] = INF
    logits[2] = -INF
    logits[3, 17] = NAN
    logits[4, 17] = -INF
    cases = [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}, {"min_p": 0.1}, {"logprobs": 1}]
    state, batch = entered(cases, path)
    before = state.history.clone()
    sampled = sample(logits.to(path), state, batch)

    assert sampled.failed.tolist() == [True, True, True, True, False, False]
    assert sampled.tokens[:4].tolist() == [0] * 4
    assert torch.equal(state.history[batch.slots[:4].long()], before[batch.slots[:4].long()])


def test_padding_rows_cost_nothing_and_touch_nothing(path: str) -> None:
    cases = [{"top_p": 0.9, "presence_penalty": 0.5, "logprobs": 2}, {"temperature": 0.0}]
    logits = torch.cat((distinct(2), torch.full((3, VOCAB_SIZE), NAN)))
    state, batch = entered(cases, path)
    padding = torch.full((3,), -1, dtype=torch.int32, device=path)
    padded = SamplingBatch(torch.cat((batch.slots, padding)), torch.cat((batch.positions, padding)), batch.needs)
    alone_state, _ = entered(cases, path)
    alone = sample(logits[:2].clone().to(path), alone_state, batch)
    sampled = sample(logits.to(path), state, padded)

    assert sampled.tokens.tolist() == [*alone.tokens.tolist(), 0, 0, 0]
    assert not sampled.failed.any()
    assert torch.equal(state.history, alone_state.history)
    assert torch.equal(state.counts, alone_state.counts)


def test_no_rows(path: str) -> None:
    state, _ = entered([{}], path)
    empty = torch.empty(0, dtype=torch.int32, device=path)

    assert sample(torch.empty(0, VOCAB_SIZE, device=path), state, SamplingBatch(empty, empty, Needs())).tokens.shape == (0,)


def test_needs_beyond_the_rows_change_nothing(path: str) -> None:
    logits = distinct(len(CASES[:4]))
    every = Needs(draws=True, cuts=True, edits=True, penalties=True, top_logprobs=2)
    state, batch = entered(CASES[:4], path)
    wide = sample(logits.clone().to(path), state, SamplingBatch(batch.slots, batch.positions, every))

    assert wide.tokens.tolist() == agree(logits, CASES[:4], path).tolist()


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.feature("Structured output", "Regular expressions, choices, grammars")
def test_masks_apply_to_chosen_rows(path: str) -> None:
    allowed = torch.rand(2, VOCAB_SIZE) < 0.01
    padded = torch.nn.functional.pad(allowed, (0, -VOCAB_SIZE % 32)).view(2, -1, 32).long()
    bitmask = (padded << torch.arange(32)).sum(-1).to(torch.int32)
    rows = torch.tensor([1, -1, 0, 1], dtype=torch.int32)
    cases = [{"temperature": 0.0}, {}, {"top_k": 5}, {"repetition_penalty": 2.0}]
    tokens = agree(distinct(4), cases, path, bitmask=bitmask, mask_rows=rows).tolist()

    assert all(allowed[mask, token] for mask, token in zip(rows.tolist(), tokens, strict=True) if mask >= 0)


@pytest.mark.feature("Structured output", "JSON, JSON Schema")
@pytest.mark.feature("Structured output", "Regular expressions, choices, grammars")
def test_log_probabilities_are_those_before_a_mask(path: str) -> None:
    logits = distinct(2)
    token = int(logits[0].argmin())
    bitmask = torch.zeros(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    bitmask[0, token >> 5] = int(np.uint32(1 << (token & 31)).view(np.int32))
    state, batch = entered([{"temperature": 0.0, "logprobs": 2}] * 2, path)
    mask_rows = torch.tensor([0, -1], dtype=torch.int32)
    batch = SamplingBatch(batch.slots, batch.positions, batch.needs, bitmask.to(path), mask_rows.to(path))
    found = sample(logits.clone().to(path), state, batch)
    expected = logits.log_softmax(-1)

    assert found.tokens.tolist() == [token, logits[1].argmax()]
    torch.testing.assert_close(found.logprobs.cpu(), expected[[0, 1], found.tokens.cpu()])
    assert found.top_tokens.tolist() == logits.topk(2).indices.tolist()
    torch.testing.assert_close(found.top_logprobs.cpu(), expected.topk(2).values)


def test_a_row_whose_mask_allows_nothing_fails(path: str) -> None:
    state, batch = entered([{"temperature": 0.0}], path)
    mask = torch.zeros(1, -(-VOCAB_SIZE // 32), dtype=torch.int32, device=path)
    batch = SamplingBatch(batch.slots, batch.positions, batch.needs, mask, torch.zeros(1, dtype=torch.int32, device=path))

    assert sample(distinct(1).to(path), state, batch).failed.tolist() == [True]


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(1, VOCAB_SIZE),
        torch.arange(VOCAB_SIZE).div(3, rounding_mode="floor").float().neg()[None] / 500,
        torch.linspace(0, -0.02, VOCAB_SIZE)[None],
        torch.linspace(0, -200, VOCAB_SIZE)[None],
        torch.linspace(3e38, -3e38, VOCAB_SIZE)[None],
    ],
    ids=["equal", "ties", "nearly flat", "steep", "greatest"],
)
def test_unusual_rows(path: str, logits: Tensor) -> None:
    cases = [{"top_p": 0.5}, {"top_p": 0.999}, {"top_k": 10}, {"top_k": 4400, "top_p": 0.7}, {"temperature": 1e-5, "top_k": 2}]
    agree(logits.expand(len(cases), -1), cases, path)


def test_a_bracket_of_more_keys_than_are_gathered(triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is then searched in the row itself."""
    monkeypatch.setattr(launch, "CAPACITY", 16)
    agree(distinct(3), [{"top_p": 0.95, "temperature": 3.0}, {"top_k": 100}, {"top_k": 200, "top_p": 0.5}], triton_path)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    count = 4000
    tokens = sample(probabilities.log().repeat(count, 1), *entered([{}] * count, "cpu", 5, [[]] * count)).tokens
    for token, share in enumerate(probabilities.tolist()):
        deviation = math.sqrt(count * share * (1 - share))

        assert abs((tokens == token).sum().item() - count * share) <= 4 * deviation


def test_penalties_are_those_of_the_counts() -> None:
    case = {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    state, batch = entered([case], "cpu", 13)
    logits = torch.ones(1, 13)
    logits[0, 5] = -1.0
    adjusted = reference.adjust(logits, state, batch)
    expected = torch.ones(13)
    expected[[3, 5]] = torch.tensor([0.5, -2.0])
    expected[[8, 11]] = torch.tensor([0.5 - 0.25 - 0.5, 0.5 - 0.25 - 3 * 0.5])

    torch.testing.assert_close(adjusted[0], expected)


def test_counts_go_on_from_step_to_step_and_saturate(path: str) -> None:
    state, batch = entered([{"frequency_penalty": 1.0, "temperature": 0.0}, {"temperature": 0.0}], path, 13)
    logits = torch.zeros(2, 13)
    logits[:, 5] = 1.5
    tokens = []
    for step in range(3):
        tokens.append(
            sample(logits.clone().to(path), state, SamplingBatch(batch.slots, batch.positions + step, batch.needs)).tokens
        )
    counts = state.counts[batch.slots.long()].cpu()

    assert torch.stack(tokens).tolist() == [[5, 5], [5, 5], [0, 5]]
    assert counts[0].tolist() == [1, 0, 0, IN_PROMPT, 0, IN_PROMPT + 2, 0, 0, IN_PROMPT + 1, 0, 0, 3, 0]
    assert counts[1].eq(0).all()
    assert state.history[batch.slots[0], : POSITION + 3].tolist() == [*PROMPT, *OUTPUT, 5, 5, 0]

    state.counts[batch.slots[0].long(), 5] = MAX_COUNT
    logits[0, 5] = 1e9
    sample(logits.to(path), state, SamplingBatch(batch.slots, batch.positions + 3, batch.needs))

    assert state.counts[batch.slots[0].long(), 5] == MAX_COUNT


def test_a_slot_is_taken_over_cleanly(path: str) -> None:
    state, _ = entered([CASES[2]], path)
    state.enter(1, np.array([1, 2], np.int32), 1, seed=0, repetition_penalty=3.0, temperature=0.0)
    counts = state.counts[1].cpu()

    assert counts[[1, 2]].tolist() == [IN_PROMPT, 1]
    assert counts.count_nonzero() == 2


@pytest.mark.feature("Sampling", "Log-probabilities")
def test_likeliest_tokens_of_equal_logits_come_in_order(triton_path: str) -> None:
    state, batch = entered([{"logprobs": 4, "temperature": 0.0}], triton_path)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 4321] = -0.0
    sampled = sample(logits.to(triton_path), state, batch)

    assert sampled.top_tokens.tolist() == [[0, 1, 2, 3]]


def test_warming_up_leaves_the_state_alone(triton_path: str) -> None:
    state, _ = entered([{"frequency_penalty": 1.0}, {"top_p": 0.5}], triton_path)
    before = [each.clone() for each in (state.params, state.counts, state.history)]
    warm_up_sampling(state)

    assert all(torch.equal(*pair) for pair in zip(before, (state.params, state.counts, state.history), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize("vocab_size", [32000, 49152, 151936, 262144])
    def test_large_vocabularies(self, vocab_size: int) -> None:
        torch.manual_seed(4)  # no draw falls next to the end of a token's share, where a GPU's exp may give it to the next one
        agree(distinct(len(CASES), vocab_size).bfloat16().float(), CASES, "cuda")

    def test_addresses_beyond_31_bits(self) -> None:
        rows, vocab_size = 9000, 262144
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GiB")
        line = distinct(1, vocab_size)
        cases = [{"top_p": 0.9}, {"temperature": 0.0}] * (rows // 2)
        state, batch = entered(cases, "cuda", vocab_size)
        tokens = sample(line.cuda().repeat(rows, 1), state, batch).tokens[-2:]
        other, last = entered([{"seed": rows - 2, **cases[-2]}, {"seed": rows - 1, **cases[-1]}], "cpu", vocab_size)

        assert tokens.tolist() == reference.sample(line.repeat(2, 1), other, last).tokens.tolist()

    def test_a_captured_graph_follows_its_buffers(self) -> None:
        cases = [{"top_p": 0.9, "presence_penalty": 0.5}, {}, {"top_k": 20}]
        state, batch = entered(cases, "cuda")
        logits = distinct(3).cuda()
        sample(logits.clone(), *entered(cases, "cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sampled = sample(logits.clone(), state, batch)
        other, other_batch = entered(cases, "cuda")
        for _ in range(3):
            graph.replay()
            expected = sample(logits.clone(), other, other_batch)

            assert torch.equal(sampled.tokens, expected.tokens)
            assert torch.equal(state.counts, other.counts)
            logits.normal_()
            batch.positions.add_(1)
            other_batch.positions.add_(1)
