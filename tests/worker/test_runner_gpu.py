"""The runner on a GPU: graphs, steps in flight and memory. The same plans on CPU are the reference."""

from collections import deque

import msgspec
import pytest
import torch

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.models.config import ModelConfig
from dashinfer.types import ModelFiles, SamplingParams, StepResult, WorkerConfig
from dashinfer.worker.runner import Runner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1009,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}
CONFIG = WorkerConfig(
    rank=0,
    world_size=1,
    files=ModelFiles("toy", "safetensors", (), MODEL),
    device="cuda",
    data_type="float32",
    load_format="dummy",
    max_batch=12,
    max_length=512,
    max_step_tokens=256,
    block_size=16,
    kv_cache_memory=64 << 20,
)


def load(**changes) -> Runner:
    return Runner(msgspec.structs.replace(CONFIG, **changes), ModelConfig.from_hf(MODEL), lambda *_: None)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 15, 16, 17, 100, 300, 33, 250, 5, 64, 31, 200, 128]
    return [torch.randint(0, 1009, (length,), generator=generator).tolist() for length in lengths]


def generate(runner: Runner, params: list[SamplingParams], num_blocks: int = 400) -> list[list[int]]:
    """Two plans with the device at any time, as the engine keeps it."""
    scheduler = Scheduler(num_blocks=num_blocks, block_size=16, max_batch=12, max_step_tokens=256)
    sequences = [Sequence(len(tokens), tokens, one) for tokens, one in zip(prompts(), params, strict=True)]
    for sequence in sequences:
        scheduler.add(sequence)
    steps: deque = deque()
    while True:
        while len(steps) < 2 and (plan := scheduler.schedule()) is not None:
            steps.append(runner.launch(plan))
        if not steps:
            return [sequence.tokens[sequence.prompt_length :] for sequence in sequences]
        result: StepResult = steps.popleft().result()
        assert result.failed == []
        scheduler.apply(result)


def params(**changes) -> list[SamplingParams]:
    return [SamplingParams(**{"max_tokens": 40, "seed": seed, "temperature": 0.0, **changes}) for seed in range(14)]


@pytest.fixture(scope="module")
def graphs() -> Runner:
    return load()


@pytest.mark.feature("Models", "Qwen3")
@pytest.mark.feature("Parallelism and recovery", "CUDA graphs")
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}, {"frequency_penalty": 0.5}, {"logprobs": 3}],
    ids=str,
)
def test_graphs_and_eager_steps_give_the_tokens_of_the_cpu(graphs, changes):
    runner = load(enforce_eager=True)
    eager = generate(runner, params(**changes))

    assert (graphs._executor._graphs is not None, runner._executor._graphs) == (True, None)
    assert generate(graphs, params(**changes)) == eager
    assert eager == generate(load(device="cpu"), params(**changes))


@pytest.mark.feature("Parallelism and recovery", "Continuous batching, prefix cache, preemption")
def test_preempted_sequences_go_on(graphs):
    assert generate(graphs, params(), num_blocks=40) == generate(graphs, params())


def test_it_says_what_memory_went_where(graphs):
    ready = graphs.ready

    assert ready.weight_bytes > 0
    assert ready.activation_bytes > 0
    assert ready.graph_bytes >= 0
    assert ready.kv_cache_bytes <= 64 << 20
    assert "NVIDIA" in ready.device or "AMD" in ready.device


def test_the_kv_cache_takes_its_share_of_the_device():
    free, total = torch.cuda.mem_get_info()
    runner = load(kv_cache_memory=None, gpu_memory_utilization=0.5, max_batch=12)
    used = free - torch.cuda.mem_get_info()[0]

    assert used < 0.55 * total
    assert runner.ready.num_blocks > 0


@pytest.mark.parametrize("data_type", ["bfloat16", "float16"])
def test_half_precision_runs_and_repeats_itself(data_type):
    runner = load(data_type=data_type)

    assert generate(runner, params(temperature=1.0)) == generate(runner, params(temperature=1.0))
