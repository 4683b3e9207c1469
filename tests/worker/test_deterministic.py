"""Deterministic mode on a random model in bfloat16, driven by the scheduler's plans.

A request's tokens and log-probabilities are, to the bit, those of the request alone, however its prompt is chunked or cached
and whatever else runs.
"""

import msgspec
import pytest
import torch

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.models.config import ModelConfig
from dashinfer.types import ModelFiles, SamplingParams, TokenLogprobs, WorkerConfig
from dashinfer.worker.runner import Runner
from dashinfer_kernels import dispatch

pytestmark = pytest.mark.feature("Parallelism and recovery", "Same bits in any company")

# Sizes that fill no vector, and many inputs of the MLP's second layer: one row is summed otherwise than several there.
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1031,
    "hidden_size": 208,
    "intermediate_size": 1900,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 512,
    "rope_theta": 100.0,
    "tie_word_embeddings": True,
}
BLOCK_SIZE = 8
NUM_BLOCKS = 160
MAX_BATCH = 12
CONFIG = WorkerConfig(
    rank=0,
    world_size=1,
    files=ModelFiles("toy", "safetensors", (), MODEL),
    device="cpu",
    data_type="bfloat16",
    load_format="dummy",
    max_batch=MAX_BATCH,
    max_length=320,
    max_step_tokens=512,
    block_size=BLOCK_SIZE,
    kv_cache_memory=64 << 20,
    deterministic=True,
)
LENGTHS = [37, 5, 160, 22, 1, 130, 64, 99, 180, 17]
MAX_TOKENS = 10

Answer = tuple[list[int], list[TokenLogprobs]]


ON_GPU = pytest.param(
    ("cuda", 1), id="GPU", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


@pytest.fixture(
    scope="module", params=[pytest.param(("cpu", 1), id="1 thread"), pytest.param(("cpu", 2), id="2 threads"), ON_GPU]
)
def runner(request: pytest.FixtureRequest):
    device, num_threads = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    yield Runner(msgspec.structs.replace(CONFIG, device=device), ModelConfig.from_hf(MODEL), lambda *_: None)
    dispatch.deterministic = False
    torch.set_num_threads(threads)


def prompt(number: int) -> list[int]:
    """The second half of them begins as the first does."""
    generator = torch.Generator().manual_seed(number % 5)
    return torch.randint(0, 1031, (LENGTHS[number],), generator=generator).tolist()


PROMPTS = [prompt(number) for number in range(len(LENGTHS))]
PARAMS = [
    SamplingParams(max_tokens=MAX_TOKENS, seed=number, temperature=(0.0, 1.0, 0.7)[number % 3], top_p=0.9, logprobs=3)
    for number in range(len(LENGTHS))
]


def generate(
    runner: Runner,
    numbers: list[int],
    *,
    max_step_tokens: int = 512,
    num_blocks: int = NUM_BLOCKS,
    prefix_cache: bool = False,
    rounds: int = 1,
    apart: int = 0,
) -> tuple[list[Answer], int, int]:
    """The answers to the prompts of those numbers, of the last round; preemptions; prompt tokens cached in that round.

    A prompt enters every `apart` steps.
    """
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_batch=MAX_BATCH,
        max_step_tokens=max_step_tokens,
        prefix_cache=prefix_cache,
    )
    for _ in range(rounds):
        sequences = [Sequence(len(PROMPTS[number]), list(PROMPTS[number]), PARAMS[number]) for number in numbers]
        logprobs: dict[Sequence, list[TokenLogprobs]] = {sequence: [] for sequence in sequences}
        coming, step = list(sequences), 0
        while True:
            while coming and step >= apart * (len(sequences) - len(coming)):
                scheduler.add(coming.pop(0))
            step += 1
            plan = scheduler.schedule()
            if plan is None:
                break
            for update in scheduler.apply(runner.execute(plan)):
                logprobs[update.sequence].append(update.logprobs)
    answers = [(sequence.tokens[sequence.prompt_length :], logprobs[sequence]) for sequence in sequences]
    return answers, scheduler.preemptions, sum(sequence.cached_tokens for sequence in sequences)


EVERYBODY = list(range(len(LENGTHS)))


@pytest.fixture(scope="module")
def alone(runner: Runner) -> list[Answer]:
    return [generate(runner, [number])[0][0] for number in EVERYBODY]


def test_alone(alone: list[Answer]) -> None:
    assert all(len(tokens) == len(logprobs) == MAX_TOKENS for tokens, logprobs in alone)
    assert len({tuple(tokens) for tokens, _ in alone}) == len(alone)


@pytest.mark.parametrize(
    "company",
    [EVERYBODY, EVERYBODY[::-1], [4, 1, 0], [9, 2, 9, 7, 5, 2, 1], [6, 3, 0, 8, 6, 3, 1, 9, 9, 4, 7]],
    ids=lambda company: "-".join(map(str, company)),
)
@pytest.mark.parametrize("apart", [0, 2])
def test_in_company(runner: Runner, alone: list[Answer], company: list[int], apart: int) -> None:
    answers, _, _ = generate(runner, company, apart=apart)

    assert answers == [alone[number] for number in company]


@pytest.mark.parametrize("max_step_tokens", [13, 29, 101])
def test_in_chunks(runner: Runner, alone: list[Answer], max_step_tokens: int) -> None:
    answers, _, _ = generate(runner, EVERYBODY, max_step_tokens=max_step_tokens)

    assert answers == alone


@pytest.mark.parametrize("max_step_tokens", [512, 23])
def test_with_cached_prefixes(runner: Runner, alone: list[Answer], max_step_tokens: int) -> None:
    answers, _, cached = generate(runner, EVERYBODY, max_step_tokens=max_step_tokens, prefix_cache=True, rounds=2)

    assert cached > sum(LENGTHS) // 2
    assert answers == alone


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_with_a_quantised_cache(kv_cache_dtype: str, alone: list[Answer]) -> None:
    """In company, in chunks and through preemptions. `alone` sets the number of threads."""
    config = msgspec.structs.replace(CONFIG, kv_cache_dtype=kv_cache_dtype)
    torch.manual_seed(0)
    quantised = Runner(config, ModelConfig.from_hf(MODEL), lambda *_: None)
    numbers = [0, 1, 3, 4, 9, 6, 1, 9, 4, 0]
    own = {number: generate(quantised, [number])[0][0] for number in set(numbers)}

    answers, preemptions, _ = generate(quantised, numbers, num_blocks=13, max_step_tokens=50)

    assert preemptions > 0
    assert answers == [own[number] for number in numbers]
    assert answers != [alone[number] for number in numbers]


@pytest.mark.parametrize("num_blocks", [13, 28])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_through_preemptions(runner: Runner, alone: list[Answer], prefix_cache: bool, num_blocks: int) -> None:
    numbers = [0, 1, 3, 4, 9, 6, 1, 9, 4, 0]
    answers, preemptions, _ = generate(runner, numbers, num_blocks=num_blocks, prefix_cache=prefix_cache)

    assert preemptions > 0
    assert answers == [alone[number] for number in numbers]
