"""The engine without processes: the scheduler and one rank's runner, in the order in which parent and worker call them.

All that knows how a runner is made and called.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dashinfer.engine.scheduler import Scheduler, Update
from dashinfer.models.config import ModelConfig
from dashinfer.types import ModelFiles, StepPlan, WorkerConfig
from dashinfer.worker.runner import Runner

PLANS_AHEAD = 2


@dataclass
class InProcess:
    """A loaded model with random weights. `run` serves what was added to the scheduler."""

    runner: Runner
    model: ModelConfig
    max_batch: int

    @classmethod
    def load(cls, hf_config: dict[str, Any], *, device: str, data_type: str, max_batch: int, max_length: int) -> "InProcess":
        model = ModelConfig.from_hf(hf_config)
        config = WorkerConfig(
            rank=0,
            world_size=1,
            files=ModelFiles("dummy", "safetensors", (), hf_config),
            device=device,
            data_type=data_type,
            load_format="dummy",
            max_batch=max_batch,
            max_length=max_length,
            max_step_tokens=None,
            block_size=None,
            kv_cache_memory=None,
        )
        return cls(Runner(config, model, lambda stage, done, total, unit: None), model, max_batch)

    def new_scheduler(self) -> Scheduler:
        """Over the runner's blocks, without a prefix cache: prompts are computed whole."""
        ready = self.runner.ready
        return Scheduler(
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            max_batch=self.max_batch,
            max_step_tokens=ready.max_step_tokens,
            prefix_cache=False,
        )

    def run(
        self, scheduler: Scheduler, on_step: Callable[[StepPlan, list[Update]], None], on_launch: Callable[[StepPlan], None]
    ) -> None:
        """Execute plans, two at a time with the device, until nothing is left.

        Args:
            on_step: gets each plan and what came of it, as soon as that is known.
            on_launch: gets each plan before it is launched.
        """
        plans: deque[tuple[StepPlan, Any]] = deque()
        while True:
            while scheduler.num_planned < PLANS_AHEAD and (plan := scheduler.schedule()) is not None:
                on_launch(plan)
                plans.append((plan, self.runner.launch(plan)))
            if not plans:
                return
            plan, step = plans.popleft()
            on_step(plan, scheduler.apply(step.result()))
