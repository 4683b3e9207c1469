"""The section `peer`: transformers' continuous batching on the engine section's model and workload, with random weights too."""

import time
from collections.abc import Callable
from typing import Any

import torch

from bench.gpu.workload import client_figures, make_workload

Row = dict[str, Any]
TOY_CACHE = {"num_blocks": 8, "max_batch_tokens": 64}  # else it takes most of the machine's memory


def run(emit: Callable[[Row], None], *, deadline: float, toy: bool) -> None:
    """Measure every batch until `deadline`, of `time.monotonic`."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    workload = make_workload(toy=toy)
    device = torch.device("cpu" if toy else "cuda")
    settings = {key: value for key, value in workload.config.items() if key != "model_type"}
    config = AutoConfig.for_model(workload.config["model_type"], **settings)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if toy else torch.bfloat16).eval()
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=workload.output_tokens)
    batching = ContinuousBatchingConfig(**(TOY_CACHE if toy else {}))

    def generate(batch: int, output_tokens: int) -> list[Any]:
        outputs = model.generate_batch(
            workload.prompts(batch),
            generation_config=generation,
            continuous_batching_config=batching,
            record_timestamps=True,
            warmup=not toy,
            max_new_tokens=output_tokens,
        )
        return list(outputs.values())

    if not toy:
        generate(1, 4)
    for batch in workload.batches:
        found: Row = {"section": "peer", "batch": batch, "peer": f"transformers {transformers.__version__}"}
        if time.monotonic() > deadline:
            emit(found | {"status": "not measured: out of time"})
            continue
        outputs = generate(batch, workload.output_tokens)
        whole = [each for each in outputs if each.timestamps and len(each.timestamps) == workload.output_tokens]
        if len(whole) < batch:
            errors = {str(each.error) for each in outputs if each.error}
            emit(found | {"status": f"failed: {len(whole)} of {batch} answers; {'; '.join(sorted(errors))}"[:200]})
            continue
        began = min(each.created_time for each in whole)
        times = [[at - began for at in each.timestamps] for each in whole]
        attention = model.config._attn_implementation
        emit(found | {"status": "ok", "attention": attention, **client_figures(times)})
