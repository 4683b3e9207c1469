"""The runner on a small random model."""

import threading

import numpy as np
import pytest
import torch

from dashinfer.errors import ConfigurationError, InsufficientMemory
from dashinfer.models.config import ModelConfig
from dashinfer.types import Chunk, Enter, Masks, StepPlan
from dashinfer.worker import capacity
from dashinfer.worker import runner as runner_module
from dashinfer.worker.capacity import count_blocks, step_bytes
from dashinfer.worker.distributed import select_device
from dashinfer.worker.runner import check_float8, costly_plan
from tests.worker.toy import BLOCK_BYTES, MODEL, PaddedGraphs, generate, greedy, load, prompt

MIB = 1 << 20


@pytest.fixture(scope="module", params=["plain", "graphs"])
def runner(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load()
    if request.param == "graphs":
        loaded._executor.use_graphs(PaddedGraphs)
    yield loaded
    torch.set_num_threads(threads)


def test_what_it_says_when_it_is_ready(runner):
    ready = runner.ready

    assert (ready.architecture, ready.device, ready.data_type) == ("LlamaForCausalLM", "cpu", "float32")
    assert (ready.vocab_size, ready.max_length, ready.block_size, ready.num_blocks) == (211, 64, 8, 24)
    assert ready.kv_cache_bytes == 24 * BLOCK_BYTES


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_a_quantised_cache_holds_more_tokens_in_the_same_memory(kv_cache_dtype):
    ready = load(kv_cache_dtype=kv_cache_dtype).ready

    assert ready.kv_cache_dtype == kv_cache_dtype
    assert ready.num_blocks == 24 * 16 * 4 // (16 + 4)
    assert ready.kv_cache_bytes == ready.num_blocks * BLOCK_BYTES * (16 + 4) // (16 * 4)


def test_a_gpu_that_knows_no_float8_is_refused():
    check_float8("NVIDIA L4", (8, 9))
    check_float8("NVIDIA H200", (9, 0))
    with pytest.raises(ConfigurationError) as caught:
        check_float8("NVIDIA A100", (8, 0))

    assert str(caught.value) == (
        "--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or higher, and NVIDIA A100 has 8.0; "
        "use --kv-cache-dtype int8"
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_in_one_chunk_in_chunks_and_in_a_batch(runner, temperature):
    prompts = [prompt(length, seed) for seed, length in enumerate([37, 5, 16, 22, 1, 30])]
    each = [greedy(temperature=temperature) for _ in prompts]
    alone = [generate(runner, [tokens], [one])[0] for tokens, one in zip(prompts, each, strict=True)]

    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    assert generate(runner, prompts, each) == alone  # twice as many as slots, which are used again
    assert generate(runner, prompts, each, max_step_tokens=7) == alone
    assert generate(runner, prompts, each, ahead=1) == alone
    assert generate(load(), prompts[:1], each[:1]) == alone[:1]


def test_a_sequence_goes_on_after_a_preemption_as_if_nothing_had_been(runner):
    tokens, one = prompt(20, 7), greedy(16)
    (whole,) = generate(runner, [tokens], [one])
    (rest,) = generate(runner, [tokens + whole[:6]], [greedy(10)])

    assert rest == whole[6:]


def test_tokens_that_come_with_a_chunk_are_the_sequences(runner):
    tokens, forced = prompt(6, 7), [5, 9, 17, 3]
    (other,) = generate(runner, [tokens], [greedy(3)])
    (rest,) = generate(runner, [tokens + forced], [greedy(3)])
    enter = [Enter(slot, _bytes(tokens), 6, greedy()) for slot in range(2)]
    first = runner.execute(StepPlan(0, enter, [Chunk(0, 0, 6, True, (0, 1)), Chunk(1, 0, 6, True, (2, 3))]))
    jump = Chunk(0, 6, 4, True, (), _bytes(forced))  # over the token that was sampled
    second = runner.execute(StepPlan(1, [], [Chunk(1, 6, 1, True, ()), jump]))
    single = Chunk(0, 10, 1, True, (), _bytes(rest[:1]))
    third = runner.execute(StepPlan(2, [], [Chunk(1, 7, 1, True, ()), single]))

    assert [first.tokens[1], second.tokens[0], third.tokens[0]] == other
    assert [second.tokens[1], third.tokens[1]] == rest[:2]


def test_a_masked_step_waits_for_its_masks(runner):
    enter = [Enter(slot, bytes(4), 1, greedy()) for slot in range(3)]
    plan = StepPlan(7, enter, [Chunk(slot, 0, 1, True, (slot,)) for slot in range(3)], masked=True)
    (free,) = set(runner.execute(StepPlan(6, enter, plan.chunks)).tokens)
    words = np.zeros((2, 7), "<i4")
    words[0, 3], words[1, 6] = 1 << 5, 1 << 18 | 1 << 20  # the last one is beyond the vocabulary
    results = []
    thread = threading.Thread(target=lambda: results.append(runner.execute(plan)))
    thread.start()
    runner.masks.put(Masks(5, (), b""))  # of a step that was dropped
    thread.join(0.05)
    waits = thread.is_alive()
    runner.masks.put(Masks(7, (2, 0), words.tobytes()))
    thread.join(10)

    assert waits
    assert results[0].tokens == [210, free, 101]
    assert results[0].failed == []


def test_a_step_whose_masked_sequences_have_ended_is_as_any_other(runner):
    enter = [Enter(0, bytes(4), 1, greedy())]
    chunks = [Chunk(0, 0, 1, True, (0,))]
    runner.masks.put(Masks(9, (), b""))

    assert runner.execute(StepPlan(9, enter, chunks, masked=True)).tokens == runner.execute(StepPlan(10, enter, chunks)).tokens


def _bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, "<i4").tobytes()


def test_a_request_for_logprobs_and_one_without_sit_in_one_step(runner):
    plan = StepPlan(
        0,
        [Enter(slot, bytes(4), 1, greedy(logprobs=2 if slot else None)) for slot in range(2)],
        [Chunk(slot, 0, 1, True, (slot,)) for slot in range(2)],
    )
    result = runner.execute(plan)

    assert list(result.logprobs) == [1]
    assert result.logprobs[1].top_tokens[0] == result.tokens[1] == result.tokens[0]
    assert result.failed == []


def test_a_model_that_overflows_fails_its_rows(runner, monkeypatch):
    whole = runner._executor._model.logits

    def overflowing(hidden):
        logits = whole(hidden)
        logits[0] = float("nan")
        return logits

    monkeypatch.setattr(runner._executor._model, "logits", overflowing)
    plan = StepPlan(
        0, [Enter(slot, bytes(4), 1, greedy()) for slot in range(2)], [Chunk(slot, 0, 1, True, (slot,)) for slot in range(2)]
    )

    assert runner.execute(plan).failed == [0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 1 TiB"),
    ],
    ids=str,
)
def test_memory_that_runs_out_in_a_step_is_one_line(runner, monkeypatch, error):
    def forward(*_):
        raise error

    monkeypatch.setattr(runner._executor._model, "forward", forward)
    plan = StepPlan(0, [Enter(0, bytes(4), 1, greedy())], [Chunk(0, 0, 1, True, (0,))])
    with pytest.raises(InsufficientMemory, match=r"^toy: memory ran out in a step; lower --max-step-tokens, "):
        runner.execute(plan)


def test_after_a_step_without_memory_all_begins_anew(runner, monkeypatch):
    tokens = prompt(20, 7)
    (expected,) = generate(runner, [tokens], [greedy()])
    forward, steps = runner._executor._model.forward, []

    def fail_once(*arguments, **options):
        steps.append(None)
        if len(steps) == 3:
            raise MemoryError
        return forward(*arguments, **options)

    monkeypatch.setattr(runner._executor._model, "forward", fail_once)
    with pytest.raises(InsufficientMemory):
        generate(runner, [prompt(30, 8), tokens], [greedy(), greedy()])
    runner.reset()

    assert generate(runner, [tokens], [greedy()]) == [expected]


def test_another_error_of_torch_is_not_hidden(runner, monkeypatch):
    def forward(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(runner._executor._model, "forward", forward)
    with pytest.raises(RuntimeError, match=r"^shapes"):
        runner.execute(StepPlan(0, [Enter(0, bytes(4), 1, greedy())], [Chunk(0, 0, 1, True, (0,))]))


def test_an_allocation_that_fails_is_one_line(monkeypatch):
    def allocate(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(runner_module, "allocate_kv_cache", allocate)
    with pytest.raises(InsufficientMemory, match=r"^toy: memory ran out for the KV cache; lower --kv-cache-memory"):
        load()


def test_ranks_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 120)

    assert capacity.free_memory(torch.device("cpu"), 1) == 120
    assert capacity.free_memory(torch.device("cpu"), 4) == 30


def test_a_cache_that_is_asked_for_leaves_room_for_steps(monkeypatch):
    activations = step_bytes(ModelConfig.from_hf(MODEL), 1024, 3)
    monkeypatch.setattr(runner_module, "free_memory", lambda *_: 24 * BLOCK_BYTES + activations)

    assert load(kv_cache_memory=24 * BLOCK_BYTES).ready.num_blocks == 24
    with pytest.raises(InsufficientMemory, match=r"^toy: --kv-cache-memory asks for .* steps leave only"):
        load(kv_cache_memory=25 * BLOCK_BYTES)


def test_a_step_of_many_tokens_keeps_memory_for_them():
    config = ModelConfig.from_hf(MODEL)
    wide = ModelConfig.from_hf(MODEL | {"intermediate_size": 1000})

    assert step_bytes(config, 100, 3) == 100 * 32 * 64 + 3 * 211 * 32
    assert step_bytes(wide, 100, 3) == 100 * 8 * 1000 + 3 * 211 * 32


def blocks(**changes) -> int:
    values = {
        "name": "toy",
        "data_type": "bfloat16",
        "kv_cache_dtype": "auto",
        "block_bytes": MIB,
        "block_size": 16,
        "max_batch": 4,
        "max_length": 100,  # 7 blocks
        "requested": None,
        "free": 50 * MIB,
        "available": 20 * MIB,
    }
    return count_blocks(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 20),
        ({"available": 7 * MIB}, 7),
        ({"available": 40 * MIB}, 28),  # more than a full batch can use is left to others
        ({"requested": 40 * MIB}, 40),  # unless it is asked for
        ({"requested": 50 * MIB}, 50),
        ({"requested": 7 * MIB + 5, "available": -MIB}, 7),
    ],
)
def test_how_many_blocks(changes, expected):
    assert blocks(**changes) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"available": 6 * MIB},
            "toy: the KV cache of one sequence of 100 tokens needs 7 MiB in bfloat16, but 6 MiB are available; "
            "lower --max-length (to 96 or less) or use --kv-cache-dtype int8",
        ),
        (
            {"available": 6 * MIB, "kv_cache_dtype": "fp8"},
            "toy: the KV cache of one sequence of 100 tokens needs 7 MiB in fp8, but 6 MiB are available; "
            "lower --max-length (to 96 or less)",
        ),
        (
            {"available": -5, "data_type": "float32"},
            "toy: the KV cache of one sequence of 100 tokens needs 7 MiB in float32, but 0 MiB are available; "
            "free some memory or use a smaller model or use --data-type bfloat16 or use --kv-cache-dtype int8",
        ),
        (
            {"requested": 3 * MIB},
            "toy: the KV cache of one sequence of 100 tokens needs 7 MiB in bfloat16, but 3 MiB are given by "
            "--kv-cache-memory; raise --kv-cache-memory or lower --max-length (to 48 or less) or use --kv-cache-dtype int8",
        ),
        (
            {"requested": 5},
            "toy: the KV cache of one sequence of 100 tokens needs 7 MiB in bfloat16, but 0 MiB are given by "
            "--kv-cache-memory; raise --kv-cache-memory or use --kv-cache-dtype int8",
        ),
        (
            {"requested": 2048 * MIB},
            "toy: --kv-cache-memory asks for 2.0 GiB, but steps leave only 50 MiB of memory free; "
            "lower it, or leave it out to take what is there",
        ),
    ],
)
def test_too_little_memory_says_what_to_change(changes, message):
    with pytest.raises(InsufficientMemory) as caught:
        blocks(**changes)

    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "has_cuda", "expected"),
    [("auto", False, "cpu"), ("auto", True, "cuda:0"), ("cpu", True, "cpu"), ("cuda", True, "cuda:0")],
)
def test_the_device(monkeypatch, name, has_cuda, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    assert select_device(name) == torch.device(expected)
    assert chosen == ([torch.device(expected)] if expected != "cpu" else [])
    if expected != "cpu":
        assert select_device(name, 1, 2) == torch.device("cuda:1")
        with pytest.raises(ConfigurationError) as caught:
            select_device(name, 0, 3)
        assert str(caught.value) == (
            "3 ranks on this machine need a GPU each, and it has 2 (NVIDIA L4); split the model over 2, or use --device cpu"
        )


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="--device cuda: torch finds no CUDA device"):
        select_device("cuda")


@pytest.mark.parametrize(
    ("tokens", "max_batch", "max_length"), [(512, 8, 100), (8, 8, 100), (8192, 32, 8192), (700, 300, 64), (9, 3, 1)]
)
def test_the_costly_plan_has_every_token_and_slot(tokens, max_batch, max_length):
    plan = costly_plan(tokens, max_batch, max_length, 16)

    lengths = [chunk.length for chunk in plan.chunks]
    longest = max(max_length - 1, 1)
    assert sum(lengths) == min(tokens, max_batch * longest)
    assert {chunk.slot for chunk in plan.chunks} == set(range(max_batch)) == {enter.slot for enter in plan.enter}
    assert lengths == sorted(lengths)
    assert all(1 <= length <= longest for length in lengths)
    assert all(len(chunk.new_blocks) == -(-chunk.length // 16) for chunk in plan.chunks)


def test_the_costly_plan_runs(runner):
    assert len(runner.execute(costly_plan(100, 3, 64, 8)).logprobs) == 3
