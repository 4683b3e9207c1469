"""A step is launched without a look at what the device computes, and one that only decodes brings it one copy."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from test_executor import load
from test_warm_up import needs_interpreter, record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dashinfer.engine.scheduler import Scheduler
from dashinfer.engine.sequence import Sequence
from dashinfer.types import SamplingParams, StepResult
from dashinfer.worker.staging import Staging
from dashinfer_kernels.activation import launch as activation
from dashinfer_kernels.attention import decode, prefill
from dashinfer_kernels.norm import launch as norm
from dashinfer_kernels.rope import launch as rope
from dashinfer_kernels.sampling import launch as sampling
from tests.worker.toy import PaddedGraphs

# What a host cannot do on a GPU before the GPU has done all that comes before: to read a number, or a size that numbers decide.
WAITS = ("item", "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "bincount")
WAITS += ("_unique2", "unique_consecutive")


class NoWaits(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = [each for arg in args if isinstance(arg, list | tuple) for each in arg if isinstance(each, Tensor)]
        masked = name.startswith("index") and any(each.dtype == torch.bool for each in indices)
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or masked or counted:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class Static(PaddedGraphs):
    """Nothing of what graphs hold is looked at: kernels do not run here, and numbers mean nothing."""

    def __call__(self, columns: np.ndarray, staging: Staging) -> tuple[Tensor, Tensor]:
        rows = columns.shape[1]
        inputs = next(inputs for size, inputs in self.inputs.items() if size >= rows)
        padded = np.repeat(self.padding[:, None], inputs.shape[1], 1)
        padded[:, :rows] = columns
        staging.upload_into(inputs, padded)
        return self.record(inputs)[:rows], inputs[:, :rows]


@pytest.mark.parametrize(
    "look",
    [lambda x: x[0].item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.long().bincount()],
    ids=["item", "bool", "mask", "nonzero", "bincount"],
)
def test_a_look_is_seen(look: Any) -> None:
    with NoWaits():
        x = torch.ones(3) * 2
        with pytest.raises(RuntimeError, match="waits for the device"):
            look(x)


@needs_interpreter
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_steps_are_launched_without_waiting(triton_path: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = load(device=triton_path)
    if graphs:
        runner._executor.use_graphs(Static)
    record(monkeypatch, [activation, decode, prefill, norm, rope, sampling], runs=False)
    copies: Counter[str] = Counter()
    fill = Staging._fill
    monkeypatch.setattr(Staging, "_fill", lambda self, *args: (copies.update(["step"]), fill(self, *args)))
    scheduler = Scheduler(num_blocks=40, block_size=8, max_batch=4, max_step_tokens=24)
    asked = [(1, {}), (30, {"top_p": 0.8}), (9, {"logprobs": 2}), (17, {"presence_penalty": 1.0})]
    for seed, (length, changes) in enumerate(asked):
        params = SamplingParams(max_tokens=8, seed=seed, **{"temperature": 0.5, **changes})
        scheduler.add(Sequence(length, list(range(length)), params))
    uploads = []
    while (plan := scheduler.schedule()) is not None:
        before = copies.total()
        with NoWaits():
            runner.launch(plan)
        if not plan.enter and all(chunk.length == 1 and not chunk.tokens for chunk in plan.chunks):
            uploads.append(copies.total() - before)
        scheduler.apply(StepResult(plan.step, [5] * sum(chunk.sample for chunk in plan.chunks)))

    assert len(uploads) > 5
    assert set(uploads) == {1}
