"""A small random model in a runner, driven by the scheduler's plans as the engine drives it."""

import msgspec
import numpy as np
import torch
from torch import Tensor

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.models.config import ModelConfig
from dashinfer.types import ModelFiles, SamplingParams, WorkerConfig
from dashinfer.worker.graphs import bucket_sizes
from dashinfer.worker.runner import Runner

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 100.0,
}
BLOCK_BYTES = 2 * 2 * 2 * 8 * 16 * 4  # keys and values, layers, heads, tokens, head_dim, float32
CONFIG = WorkerConfig(
    rank=0,
    world_size=1,
    files=ModelFiles("toy", "safetensors", (), MODEL),
    device="cpu",
    data_type="float32",
    load_format="dummy",
    max_batch=3,
    max_length=64,
    max_step_tokens=None,
    block_size=8,
    kv_cache_memory=24 * BLOCK_BYTES,
)


def load(**changes) -> Runner:
    config = msgspec.structs.replace(CONFIG, **changes)
    return Runner(config, ModelConfig.from_hf(MODEL), lambda *_: None)


class PaddedGraphs:
    """In the place of `DecodeGraphs`: calls, on static inputs, what that would record."""

    def __init__(self, record, *, max_batch: int, padding: np.ndarray, device: torch.device, report=None) -> None:
        self.record = record
        self.inputs = {
            size: torch.from_numpy(np.repeat(padding[:, None], size, 1)).to(device) for size in bucket_sizes(max_batch)
        }
        self.padding = padding
        self.padded = self.calls = 0

    def __call__(self, columns: np.ndarray, staging) -> tuple[Tensor, Tensor]:
        rows = columns.shape[1]
        size = next(size for size in self.inputs if size >= rows)
        self.calls += 1
        self.padded += size - rows
        full = np.repeat(self.padding[:, None], size, 1)
        full[:, :rows] = columns
        staging.upload_into(self.inputs[size], full)
        logits = self.record(self.inputs[size])
        assert logits[rows:].isfinite().all(), "a row without a sequence must not be a source of NaN"
        return logits[:rows], self.inputs[size][:, :rows]


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(
    runner: Runner,
    prompts: list[list[int]],
    each: list[SamplingParams],
    *,
    max_step_tokens: int = 512,
    ahead: int = 2,
    stages: int = 1,
) -> list[list[int]]:
    """What the prompts are continued with, all of them submitted at once."""
    scheduler = Scheduler(num_blocks=24, block_size=8, max_batch=3, max_step_tokens=max_step_tokens, stages=stages)
    sequences = [Sequence(len(tokens), list(tokens), one) for tokens, one in zip(prompts, each, strict=True)]
    for sequence in sequences:
        scheduler.add(sequence)
    results: list = []
    while True:
        while len(results) < ahead and (plan := scheduler.schedule()) is not None:
            results.append(runner.execute(plan))
        if not results:
            return [sequence.tokens[sequence.prompt_length :] for sequence in sequences]
        scheduler.apply(results.pop(0))


def greedy(max_tokens: int = 12, **changes) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=3, **{"temperature": 0.0, **changes})
