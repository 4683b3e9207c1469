"""A rank's model: loaded, sized to the device's memory, ready for plans. How plans are executed is the executor's matter.

All ranks of a model load at once, measure memory when all have come as far, and take what the one with the least can. With a
pipeline no CUDA graphs are recorded: what stages tell each other is not in them.
Sets for its process whether ops are deterministic.
"""

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dashinfer.errors import ConfigurationError
from dashinfer.models.config import ModelConfig
from dashinfer.models.kv_cache import allocate_kv_cache, kv_bytes_per_block, kv_dtype
from dashinfer.models.loader import load_model
from dashinfer.models.quantization import layer_bits
from dashinfer.models.shapes import head_cost
from dashinfer.models.towers import Tower
from dashinfer.models.vision_config import VisionConfig
from dashinfer.models.weights import ReportProgress
from dashinfer.types import Chunk, Encode, Enter, MediaSpan, Ready, SamplingParams, StepPlan, StepResult, WorkerConfig
from dashinfer.worker.capacity import (
    MEMORY_SHARE,
    count_blocks,
    encode_bytes,
    free_memory,
    largest_image,
    media_cache_bytes,
    out_of_memory,
    pipeline_bytes,
    step_bytes,
)
from dashinfer.worker.distributed import World, join, select_device
from dashinfer.worker.executor import Executor, LaunchedStep
from dashinfer.worker.graphs import bucket_sizes
from dashinfer.worker.masks import MaskInbox
from dashinfer.worker.media import BATCH_PATCHES, Media
from dashinfer_kernels import dispatch, share_cores, warm_up_loops

logger = logging.getLogger("dashinfer.worker")

BLOCK_SIZE = {"cpu": 16, "cuda": 64}  # from 64 on, Hopper's copy engine brings tiles of keys and values
STEP_TOKENS = {"cpu": 1024, "cuda": 8192}
GRAPH_BYTES = 32 << 20  # that a CUDA graph takes besides its tensors, generously
MEASURED_PATCHES = 4096  # that the memory of a vision tower is measured with


class Runner:
    """Loads the model that `config` names and is then ready for plans.

    Args:
        world: the ranks of the model; None: those that `config` says, which are joined here.

    Attributes:
        ready: what was found, for the parent.
        on_gpu: whether steps run on by themselves once they are launched.
        media: the images and videos of a model that sees; None: it does not.

    Raises:
        StartupError: the model, the options and the machine do not go together; the message says what to change.
        PeerLost: another rank ended meanwhile.
    """

    def __init__(
        self, config: WorkerConfig, model_config: ModelConfig, report: ReportProgress, world: World | None = None
    ) -> None:
        dispatch.deterministic = config.deterministic
        device = select_device(config.device, config.local_rank, config.local_size)
        self.on_gpu = on_gpu = device.type == "cuda"
        if not on_gpu:
            share_cores(config.local_rank, config.local_size)
        if on_gpu and config.kv_cache_dtype == "fp8":
            check_float8(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
        max_length = model_config.resolve_max_length(config.max_length)
        self._name = config.files.name
        compiling = None if on_gpu else _in_thread(warm_up_loops, getattr(torch, config.data_type))
        vision = VisionConfig.from_hf(config.files.config) if config.vision else None
        self._world = world = world or join(config, device)
        stage = replace(world.stage, head=_head_cost(config, model_config, on_gpu=on_gpu))
        place = world.group.world_size, world.group.rank, stage
        (free,) = world.least(free_memory(device, config.local_size))
        with self._out_of_memory("while loading; use a smaller model or data type, or free some memory"):
            model, tower = load_model(
                config,
                model_config,
                max_length=max_length,
                device=device,
                free=free,
                group=world.group,
                stage=stage,
                report=report,
                vision=vision,
            )
        if compiling is not None:
            compiling.result()
        block_size = config.block_size or BLOCK_SIZE[device.type]
        dtype = kv_dtype(config.kv_cache_dtype, config.data_type)
        step_tokens = max(config.max_step_tokens or STEP_TOKENS[device.type], config.max_batch)
        advice = "lower --max-step-tokens, --max-batch or --kv-cache-memory"
        self._in_a_step = f"in a step; {advice}"
        self.media: Media | None = None
        media = _MediaMemory()
        if vision is not None:
            assert tower is not None
            media = self._prepare_media(config, vision, tower, device, max_length)
        with self._out_of_memory(f"before the KV cache was there; {advice}"):
            self._executor = Executor(
                model,
                device=device,
                max_batch=config.max_batch,
                max_length=max_length,
                block_size=block_size,
                media=self.media,
                pipeline=world.pipeline,
            )
            # graphs hold decoding kernels, whose sums are not those of the kernel that chunks of prompts take
            graphs = on_gpu and not (config.enforce_eager or config.deterministic or world.pipeline)
            if on_gpu and world.pipeline is not None:
                logger.info("no CUDA graphs are recorded for a pipeline of %d stages", stage.count)
            if on_gpu:
                self._executor.use_caches(allocate_kv_cache(model_config, 1, block_size, dtype, device, *place))
                activations = self._peak(step_tokens, config.max_batch, max_length, block_size)
                activations += step_tokens * media.token_bytes + pipeline_bytes(model_config, step_tokens, stage)
                graph_bytes = 0
                if graphs:
                    graph_bytes = self._peak(config.max_batch, config.max_batch, max_length, block_size)
                    sizes = bucket_sizes(config.max_batch)  # each graph keeps its logits
                    graph_bytes += GRAPH_BYTES * len(sizes) + sum(sizes) * model_config.vocab_size * torch.float32.itemsize
                self._warm_up(config.max_batch, max_length, block_size, decodes=not graphs)
                if vision is not None:
                    self._warm_up_sight(vision, max_length)
                self._executor.use_caches([])
                torch.cuda.empty_cache()
        world.wait()
        free = free_memory(device, config.local_size)
        if on_gpu:
            total = torch.cuda.get_device_properties(device).total_memory
            available = free - int((1 - config.gpu_memory_utilization) * total) - activations - graph_bytes
        else:
            activations, graph_bytes = step_bytes(model_config, step_tokens, config.max_batch), 0
            activations += step_tokens * media.token_bytes + pipeline_bytes(model_config, step_tokens, stage)
            available = int(free * MEMORY_SHARE) - activations
        available -= media.total
        block_bytes = kv_bytes_per_block(model_config, block_size, dtype, *place)
        num_blocks = count_blocks(
            name=config.files.name,
            data_type=config.data_type,
            kv_cache_dtype=config.kv_cache_dtype,
            block_bytes=block_bytes,
            block_size=block_size,
            max_batch=config.max_batch,
            max_length=max_length,
            requested=config.kv_cache_memory,
            free=max(free - activations - graph_bytes - media.total, 0),
            available=available,
            required=config.num_blocks,
        )
        (num_blocks,) = world.least(num_blocks)
        with self._out_of_memory("for the KV cache; lower --kv-cache-memory or --max-length"):
            self._executor.use_caches(allocate_kv_cache(model_config, num_blocks, block_size, dtype, device, *place))
        if graphs:
            before = free_memory(device, config.local_size)
            with self._out_of_memory("for CUDA graphs; lower --gpu-memory-utilization, or use --enforce-eager"):
                self._executor.use_graphs(report=lambda done, total: report("graphs", done, total, ""))
            graph_bytes = max(0, before - free_memory(device, config.local_size))  # others may have freed some meanwhile
        self.ready = Ready(
            architecture=model_config.architecture,
            mode="llm" if tower is None else "vlm",
            device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
            data_type=config.data_type,
            vocab_size=model_config.vocab_size,
            max_length=max_length,
            max_step_tokens=step_tokens,
            block_size=block_size,
            num_blocks=num_blocks,
            weight_bytes=model.weight_bytes + (0 if tower is None else tower.weight_bytes),
            kv_cache_bytes=num_blocks * block_bytes,
            activation_bytes=activations + media.activations,
            graph_bytes=graph_bytes,
            kv_cache_dtype=config.kv_cache_dtype,
            vision_engine=None if tower is None else tower.engine,
            media_cache_bytes=media.cache_bytes,
            media_token_bytes=media.token_bytes,
        )

    @property
    def masks(self) -> MaskInbox:
        """Where steps that are masked find their masks."""
        return self._executor.masks

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Queue a step behind those before it; on CPU it has run on return.

        Raises:
            InsufficientMemory: there was not enough of it for the step's temporary tensors.
        """
        with self._out_of_memory(self._in_a_step):
            return self._executor.launch(plan)

    def result(self, step: LaunchedStep) -> StepResult:
        """What a step produced, once it has; raises as `launch`. On ranks other than the first of the last stage it has no
        tokens."""
        with self._out_of_memory(self._in_a_step):
            return step.result()

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step; raises as `launch`."""
        return self.result(self.launch(plan))

    def reset(self) -> None:
        """Forget all sequences, after a step for which there was not enough memory."""
        self._executor.reset()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def _warm_up(self, max_batch: int, max_length: int, block_size: int, *, decodes: bool) -> None:
        """Have the kernels compiled that requests may need and a step of as many tokens as possible does not: those of short
        prompts, of sampling in other ways and, where no graphs are recorded, with `decodes` those of fewer sequences."""
        sizes = [min(1 << each, max_batch) for each in range((max_batch - 1).bit_length() + 1)] if decodes else []
        for plan in [costly_plan(2, 1, max_length, block_size), *(costly_plan(n, n, max_length, block_size) for n in sizes)]:
            self._executor.launch(plan).result()
            self._executor.settle()
        self._executor.warm_up()

    def _peak(self, tokens: int, max_batch: int, max_length: int, block_size: int) -> int:
        """Bytes that a step of so many tokens, `max_batch` of which sample in the most costly way, takes for a while."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._executor.launch(costly_plan(tokens, max_batch, max_length, block_size)).result()
        self._executor.settle()
        return torch.cuda.max_memory_allocated() - before

    def _prepare_media(
        self, config: WorkerConfig, vision: VisionConfig, tower: Tower, device: torch.device, max_length: int
    ) -> "_MediaMemory":
        """Make the model see, which it does once here."""
        dtype, batch_patches = getattr(torch, config.data_type), BATCH_PATCHES[device.type]
        self.media = Media(
            tower,
            vision,
            name=self._name,
            device=device,
            dtype=dtype,
            batch_patches=batch_patches,
            together=not config.deterministic,
        )
        if device.type == "cuda":
            patches = max(batch_patches, largest_image(max_length) * vision.merge_size**2)
            measured = _image(vision, MEASURED_PATCHES)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._see(measured)
            peak = torch.cuda.max_memory_allocated() - before
            activations = peak * patches // math.prod(measured.grid)
        else:
            self._see(_image(vision, vision.merge_size**2))
            # larger images take of what is left to others
            activations = encode_bytes(vision, batch_patches)
        token_bytes = vision.out_hidden_size * dtype.itemsize * (1 + len(vision.deepstack_blocks))
        self._world.wait()
        cache_bytes = media_cache_bytes(
            self._name,
            requested=config.media_cache_memory,
            free=max(free_memory(device, config.local_size) - activations, 0),
            token_bytes=token_bytes,
            max_length=max_length,
            device=device,
        )
        (cache_bytes,) = self._world.least(cache_bytes)
        return _MediaMemory(token_bytes, cache_bytes, activations)

    def _see(self, image: Encode, plan: StepPlan | None = None) -> None:
        """Encode an image, run a step that shows it, and forget it."""
        assert self.media is not None
        self.media.ask(image)
        self.media.finish([image.key])
        if plan is not None:
            self._executor.launch(plan).result()
        self.media.forget([image.key])

    def _warm_up_sight(self, vision: VisionConfig, max_length: int) -> None:
        """Have the kernels compiled that a step with an image needs."""
        image = _image(vision, 2 * vision.merge_size**2)
        length = min(vision.num_tokens(image.grid), max_length - 1)
        if length > 0:
            enter = Enter(
                0,
                bytes(4 * length),
                length,
                SamplingParams(max_tokens=1, seed=0),
                media=(MediaSpan(image.key, 0, 0, length),),
                positions=bytes(12 * length),
            )
            self._see(image, StepPlan(0, [enter], [Chunk(0, 0, length, True, (0,))]))

    def _out_of_memory(self, where: str) -> AbstractContextManager[None]:
        return out_of_memory(self._name, where)


@dataclass(frozen=True)
class _MediaMemory:
    """Bytes: of a token's embeddings, of all embeddings that are kept, and of what encoding takes for a while."""

    token_bytes: int = 0
    cache_bytes: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.cache_bytes + self.activations


def _image(vision: VisionConfig, patches: int) -> Encode:
    """A black one of about so many patches."""
    rows = max(math.isqrt(patches) // vision.merge_size, 1) * vision.merge_size
    columns = max(patches // rows // vision.merge_size, 1) * vision.merge_size
    return Encode(b"black", (1, rows, columns), bytes(rows * columns * vision.patch_dim))


def _head_cost(config: WorkerConfig, model_config: ModelConfig, *, on_gpu: bool) -> float:
    """Of the head, in layers. On CPU, where a few rows already wait for the arithmetic, a weight of fewer bits costs as much as
    any other."""
    if not on_gpu:
        return head_cost(model_config)
    bits = 8 * getattr(torch, config.data_type).itemsize
    layers = layer_bits(config.quant_type, model_config.quantization, config.quant_group_size, bits)
    return head_cost(model_config, layer_bits=layers, head_bits=layers if config.quantize_head else bits)


def _in_thread(function: Callable[..., None], *args: Any) -> Future[None]:
    executor = ThreadPoolExecutor(1)
    future = executor.submit(function, *args)
    executor.shutdown(wait=False)
    return future


def check_float8(name: str, capability: tuple[int, int]) -> None:
    """Raises ConfigurationError for a GPU that cannot convert to float8."""
    if capability < (8, 9):
        raise ConfigurationError(
            f"--kv-cache-dtype fp8 needs a GPU of compute capability 8.9 or higher, and {name} has "
            f"{'.'.join(map(str, capability))}; use --kv-cache-dtype int8"
        )


def costly_plan(tokens: int, max_batch: int, max_length: int, block_size: int) -> StepPlan:
    """A step of `tokens` tokens in as many sequences as there can be, all of which keep their tokens in the first block."""
    sampling = SamplingParams(max_tokens=1, seed=0, top_p=0.9, frequency_penalty=1.0, logprobs=20)
    enter, chunks = [], []
    for slot in reversed(range(max_batch)):  # the last ones are long
        length = min(tokens - slot, max(max_length - 1, 1))
        tokens -= length
        blocks = (0,) * -(-length // block_size)
        enter.append(Enter(slot, np.zeros(length, dtype="<i4").tobytes(), length, sampling))
        chunks.append(Chunk(slot, 0, length, True, blocks))
    return StepPlan(step=0, enter=enter, chunks=chunks[::-1])
