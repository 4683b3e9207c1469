"""The engine without processes: the scheduler and one rank's runner, in the order in which parent and worker call them.

All that knows how a runner is made and called.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dashinfer.engine.media import MediaCache
from dashinfer.engine.scheduler import Scheduler, Update
from dashinfer.models.config import ModelConfig
from dashinfer.types import Encode, ModelFiles, QuantType, StepPlan, WorkerConfig
from dashinfer.worker.__main__ import ENCODE_TIME, POLL_INTERVAL
from dashinfer.worker.runner import Runner

PLANS_AHEAD = 2


@dataclass
class InProcess:
    """A loaded model with random weights. `run` serves what was added to the scheduler."""

    runner: Runner
    model: ModelConfig
    max_batch: int
    _cache: MediaCache | None = None

    @classmethod
    def load(
        cls,
        hf_config: dict[str, Any],
        *,
        device: str,
        data_type: str,
        max_batch: int,
        max_length: int,
        pixel_values: bytes = b"",
        quant_type: QuantType | None = None,
    ) -> "InProcess":
        """`pixel_values`, as `WorkerConfig` has them, are for a model that sees."""
        sees = bool(pixel_values)
        model = ModelConfig.from_hf(hf_config, vision=sees)
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
            vision=sees,
            vision_engine="native" if sees else None,
            pixel_values=pixel_values,
            quant_type=quant_type,
        )
        return cls(Runner(config, model, lambda stage, done, total, unit: None), model, max_batch)

    def new_scheduler(self) -> Scheduler:
        """Over the runner's blocks, without a prefix cache: prompts are computed whole."""
        ready = self.runner.ready
        if ready.mode == "vlm":
            self._cache = MediaCache(capacity=ready.media_cache_bytes, token_bytes=ready.media_token_bytes)
        return Scheduler(
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            max_batch=self.max_batch,
            max_step_tokens=ready.max_step_tokens,
            prefix_cache=False,
            media_cache=self._cache,
        )

    def run(
        self, scheduler: Scheduler, on_step: Callable[[StepPlan, list[Update]], None], on_launch: Callable[[StepPlan], None]
    ) -> None:
        """Execute plans, two at a time with the device, and encode images after each, until nothing is left.

        Args:
            on_step: gets each plan and what came of it, as soon as that is known.
            on_launch: gets each plan before it is launched.
        """
        plans: deque[tuple[StepPlan, Any]] = deque()
        while True:
            while scheduler.num_planned < PLANS_AHEAD and (plan := scheduler.schedule()) is not None:
                on_launch(plan)
                plans.append((plan, self.runner.launch(plan)))
                self._encode()
            encoding = self._encode()
            if plans:
                plan, step = plans.popleft()
                on_step(plan, scheduler.apply(step.result()))
            elif not encoding:
                return

    def _encode(self) -> bool:
        """Take what the scheduler asks for, and encode for a while. Returns whether anything came of it, or will."""
        cache, media = self._cache, self.runner.media
        if cache is None or media is None:
            return False
        for message in cache.take_messages():
            if isinstance(message, Encode):
                media.ask(message)
            else:
                media.forget(message.keys)
        if media.running:
            time.sleep(POLL_INTERVAL)
        elif media.pending:
            media.advance(ENCODE_TIME["cuda"])
        new = media.take_new()
        cache.encoded(new)
        return bool(new) or media.pending
