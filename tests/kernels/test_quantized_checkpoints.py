"""Checkpoints that their own libraries quantised (`tests/models/checkpoints`), on the Triton path: the libraries' tokens."""

import json
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file
from test_executor import CONFIG

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.models.config import ModelConfig
from dashinfer.types import ModelFiles, SamplingParams
from dashinfer.worker.runner import Runner
from dashinfer_kernels.quant_matmul.weight_only import WeightOnlyLinear

FOLDER = Path(__file__).parents[1] / "models" / "checkpoints"
NAMES = ["gptq-2bit", "gptq-3bit-v2", "gptq-4bit-act-order", "gptq-8bit-rows", "awq", "packed-4bit-asymmetric"]
NAMES += ["float8-weights"]
TOKENS = 4  # each step takes the interpreter a while


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_library(name: str, triton_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = []
    multiply = WeightOnlyLinear._multiply
    monkeypatch.setattr(WeightOnlyLinear, "_multiply", lambda self, *args: (layers.append(self), multiply(self, *args))[1])
    hf_config = json.loads((FOLDER / name / "config.json").read_text())
    files = ModelFiles(name, "safetensors", (str(FOLDER / name / "model.safetensors"),), hf_config)
    config = msgspec.structs.replace(CONFIG, files=files, device=triton_path, load_format="auto")
    runner = Runner(config, ModelConfig.from_hf(hf_config), lambda *_: None)
    expected = load_file(FOLDER / name / "expected.safetensors")
    prompt = expected["prompt"].tolist()
    sequence = Sequence(len(prompt), list(prompt), SamplingParams(max_tokens=TOKENS, seed=0, temperature=0.0))
    scheduler = Scheduler(num_blocks=8, block_size=8, max_batch=1, max_step_tokens=64)
    scheduler.add(sequence)
    while (plan := scheduler.schedule()) is not None:
        scheduler.apply(runner.execute(plan))

    assert sequence.tokens[len(prompt) :] == expected["tokens"].tolist()[:TOKENS]
    assert len(set(layers)) >= 6
