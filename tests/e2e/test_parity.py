"""Greedy tokens of the engine, in float32 on the demo model, are those of transformers: alone, batched, from cached prefixes,
and through preemptions.

The oracle checks a whole answer with one forward pass: every token of it must be the likeliest one after those before it, which
is what greedy decoding means.
"""

from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from dashinfer.config import ServerConfig
from dashinfer.engine.engine import Engine
from dashinfer.sources import ModelSource
from dashinfer.types import SamplingParams
from dashinfer.worker.supervisor import one_error

from .conftest import Text
from .prompts import PROMPTS

pytestmark = [
    pytest.mark.feature("Models", "Llama, Mistral"),
    pytest.mark.feature("Models", "GGUF, with weights of 4 to 32 bits"),
    pytest.mark.feature("Parallelism and recovery", "Continuous batching, prefix cache, preemption"),
]

MAX_TOKENS = 24


@asynccontextmanager
async def engine(demo: ModelSource, **settings):
    config = ServerConfig(model="demo", data_type="float32", device="cpu", **settings)
    with one_error():
        async with trio.open_nursery() as nursery:
            engine = Engine(config, demo.files)
            await nursery.start(engine.run)
            yield engine
            nursery.cancel_scope.cancel()


async def generate(
    engine: Engine, prompt: list[int], stop: tuple[int, ...], max_tokens: int = MAX_TOKENS
) -> tuple[list[int], int]:
    """A greedy answer, and how many prompt tokens came from the prefix cache."""
    tokens = []
    params = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, stop_token_ids=stop)
    with engine.submit(prompt, [params]) as generation:
        while outputs := await generation.receive():
            tokens += [output.token for output in outputs]
        return tokens, generation.cached_tokens


async def generate_all(engine: Engine, prompts: list[list[int]], stop: tuple[int, ...]) -> tuple[list[list[int]], list[int]]:
    answers: dict[int, tuple[list[int], int]] = {}

    async def one(number: int) -> None:
        answers[number] = await generate(engine, prompts[number], stop)

    async with trio.open_nursery() as nursery:
        for number in range(len(prompts)):
            nursery.start_soon(one, number)
    return [answers[number][0] for number in range(len(prompts))], [answers[number][1] for number in range(len(prompts))]


@pytest.fixture(scope="module")
def prompts(text: Text) -> list[list[int]]:
    assert len(PROMPTS) >= 32
    return [text.prompt(*turns) for turns in PROMPTS]


@pytest.fixture(scope="module")
def expected(demo: ModelSource, text: Text, prompts: list[list[int]]) -> list[list[int]]:
    """The engine's answers one at a time, each checked against transformers."""
    stop = text.tokenizer.eos_token_ids

    async def alone() -> list[list[int]]:
        async with engine(demo, disable_prefix_cache=True) as one:
            return [(await generate(one, prompt, stop))[0] for prompt in prompts]

    answers = trio.run(alone)
    check_with_transformers(demo, prompts, answers)
    return answers


def check_with_transformers(demo: ModelSource, prompts: list[list[int]], answers: list[list[int]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    path = Path(demo.files.weights[0])
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    with torch.inference_mode():
        for turns, prompt, answer in zip(PROMPTS, prompts, answers, strict=True):
            logits = oracle(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == answer, f"the greedy answer to {turns[-1][:40]!r} differs"


def test_alone(expected):
    assert all(0 < len(answer) <= MAX_TOKENS for answer in expected)
    assert sum(len(answer) == MAX_TOKENS for answer in expected) > len(expected) // 2


async def test_batched_and_from_cached_prefixes(demo, text, prompts, expected):
    async with engine(demo, max_batch=32) as shared:
        first, _ = await generate_all(shared, prompts, text.tokenizer.eos_token_ids)
        second, cached = await generate_all(shared, prompts, text.tokenizer.eos_token_ids)
        stats = shared.stats()

    assert first == expected
    assert second == expected
    assert sum(count > 0 for count in cached) > len(prompts) // 2
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


async def test_through_preemptions(demo, text, prompts, expected):
    async with engine(demo, max_batch=16, max_length=256, kv_cache_memory=20 * 2**20, block_size=4) as small:
        answers, _ = await generate_all(small, prompts, text.tokenizer.eos_token_ids)
        stats = small.stats()

    assert stats.preemptions > 0
    assert answers == expected
    assert (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)


async def test_in_small_chunks(demo, text, prompts, expected):
    async with engine(demo, max_batch=8, max_step_tokens=16) as chunked:
        answers, _ = await generate_all(chunked, prompts[:16], text.tokenizer.eos_token_ids)

    assert answers == expected[:16]
