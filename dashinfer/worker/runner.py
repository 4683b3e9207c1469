"""Executes plans: turns a plan into the step's tensors, runs the model over the paged KV cache, and samples.

Owns a rank's model, KV cache and slots, and sets for its process whether ops are deterministic. Plans are executed strictly in
order, which is all the synchronisation that the parent's bookkeeping needs.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dashinfer.errors import ConfigurationError, InsufficientMemory
from dashinfer.models.config import ModelConfig
from dashinfer.models.kv_cache import allocate_kv_cache, kv_bytes_per_block
from dashinfer.models.loader import load_model
from dashinfer.models.memory import available_memory, format_size
from dashinfer.models.parallel import Group
from dashinfer.models.weights import ReportProgress
from dashinfer.types import DataType, Ready, StepPlan, StepResult, WorkerConfig
from dashinfer.worker.sampler import Sampler
from dashinfer.worker.slots import Slots
from dashinfer_kernels import PagedBatch, dispatch

BLOCK_SIZE = {"cpu": 16, "cuda": 16}
STEP_TOKENS = {"cpu": 1024, "cuda": 8192}
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.9}  # of what is available once the weights are there
# A step's temporary tensors, generously, in bytes: for a token the greater of the first two, for a row of logits the last
HIDDEN_BYTES = 32  # times hidden size
INTERMEDIATE_BYTES = 8  # times intermediate size
LOGIT_BYTES = 32  # times vocabulary

logger = logging.getLogger("dashinfer.worker")


class Runner:
    """Loads the model that `config` names and is then ready for plans.

    Raises:
        StartupError: the model, the options and the machine do not go together; the message says what to change.
    """

    def __init__(self, config: WorkerConfig, model_config: ModelConfig, report: ReportProgress) -> None:
        dispatch.deterministic = config.deterministic
        device = select_device(config.device)
        max_length = model_config.resolve_max_length(config.max_length)
        self._name = config.files.name
        self._device = device
        if device.type == "cuda" and config.rank == 0:
            logger.warning("this version has no kernels for GPUs: operations run as plain torch, far below the device's speed")
        with self._out_of_memory("while loading; use a smaller model or data type, or free some memory"):
            self._model = load_model(
                config,
                model_config,
                max_length=max_length,
                device=device,
                free=free_memory(device, config.world_size),
                group=Group(config.rank, config.world_size),
                report=report,
            )
        self._block_size = config.block_size or BLOCK_SIZE[device.type]
        dtype = getattr(torch, config.data_type)
        block_bytes = kv_bytes_per_block(model_config, self._block_size, dtype, config.world_size)
        step_tokens = max(config.max_step_tokens or STEP_TOKENS[device.type], config.max_batch)
        num_blocks = count_blocks(
            name=config.files.name,
            data_type=config.data_type,
            block_bytes=block_bytes,
            block_size=self._block_size,
            max_batch=config.max_batch,
            max_length=max_length,
            requested=config.kv_cache_memory,
            free=(free := free_memory(device, config.world_size)),
            available=int(free * MEMORY_SHARE[device.type]) - step_bytes(model_config, step_tokens, config.max_batch),
        )
        with self._out_of_memory("for the KV cache; lower --kv-cache-memory or --max-length"):
            self._kv_caches = allocate_kv_cache(model_config, num_blocks, self._block_size, dtype, device, config.world_size)
        self._slots = Slots(config.max_batch, max_length, self._block_size, model_config.vocab_size)
        self._sampler = Sampler(self._slots)
        self.ready = Ready(
            architecture=model_config.architecture,
            mode="llm",
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            data_type=config.data_type,
            vocab_size=model_config.vocab_size,
            max_length=max_length,
            max_step_tokens=step_tokens,
            block_size=self._block_size,
            num_blocks=num_blocks,
            weight_bytes=self._model.weight_bytes,
            kv_cache_bytes=num_blocks * block_bytes,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step.

        Raises:
            InsufficientMemory: there was not enough of it for the step's temporary tensors.
        """
        advice = "lower --max-step-tokens, --max-batch or --kv-cache-memory"
        with torch.inference_mode(), self._out_of_memory(f"in a step; {advice}"):
            return self._execute(plan)

    def _execute(self, plan: StepPlan) -> StepResult:
        for enter in plan.enter:
            self._slots.enter(enter)
        for chunk in plan.chunks:
            self._slots.extend(chunk)
        slots = [chunk.slot for chunk in plan.chunks]
        batch = PagedBatch.build(
            [chunk.start for chunk in plan.chunks],
            [chunk.length for chunk in plan.chunks],
            self._slots.block_tables[slots],
            block_size=self._block_size,
            device=self._device,
        )
        input_ids = torch.from_numpy(self._slots.input_ids(plan.chunks)).to(self._device)
        hidden = self._model.forward(input_ids, batch, self._kv_caches)
        samplers, rows, end = [], [], 0
        for chunk in plan.chunks:
            end += chunk.length
            if chunk.sample:
                samplers.append(chunk)
                rows.append(end - 1)
        if not samplers:
            return StepResult(plan.step, [])
        if len(rows) < len(hidden):
            hidden = hidden[rows]
        tokens, logprobs, failed = self._sampler(self._model.logits(hidden), samplers)
        for chunk, token in zip(samplers, tokens, strict=True):
            self._slots.tokens[chunk.slot, chunk.start + chunk.length] = token
        return StepResult(plan.step, tokens, logprobs, failed)

    @contextmanager
    def _out_of_memory(self, where: str) -> Iterator[None]:
        """Turns a failed allocation into the one line that a user sees."""
        try:
            yield
        except RuntimeError as error:
            # on CPU it is a RuntimeError like any other
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise InsufficientMemory(f"{self._name}: memory ran out {where}") from error


def select_device(name: str) -> torch.device:
    """Raises ConfigurationError when CUDA is asked for and not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigurationError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def free_memory(device: torch.device, world_size: int) -> int:
    """Bytes that a rank can still take on its device. Ranks on CPU share the machine's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory() // world_size


def step_bytes(config: ModelConfig, step_tokens: int, max_batch: int) -> int:
    """Bytes to keep for what a step of `step_tokens` tokens, `max_batch` of which sample, allocates and frees again."""
    token = max(HIDDEN_BYTES * config.hidden_size, INTERMEDIATE_BYTES * config.intermediate_size)
    return step_tokens * token + max_batch * config.vocab_size * LOGIT_BYTES


def count_blocks(
    *,
    name: str,
    data_type: DataType,
    block_bytes: int,
    block_size: int,
    max_batch: int,
    max_length: int,
    requested: int | None,
    free: int,
    available: int,
) -> int:
    """How many KV cache blocks to allocate: what was asked for, or what is available up to what a full batch can use.

    Args:
        block_bytes: of one block of `block_size` tokens.
        requested: bytes asked for by --kv-cache-memory.
        free: bytes there are.
        available: those of them that the KV cache may take where nothing is asked for; below 0 where there are none.

    Raises:
        InsufficientMemory: more is asked for than there is, or not even one sequence of `max_length` tokens fits.
    """
    if requested is not None and requested > free:
        raise InsufficientMemory(
            f"{name}: --kv-cache-memory asks for {format_size(requested)}, but only {format_size(free)} of memory is free; "
            "lower it, or leave it out to take what is there"
        )
    budget = available if requested is None else requested
    num_blocks = max(budget, 0) // block_bytes
    blocks_per_sequence = -(-max_length // block_size)
    if num_blocks < blocks_per_sequence:
        changes = [] if requested is None else ["raise --kv-cache-memory"]
        if num_blocks:
            changes.append(f"lower --max-length (to {num_blocks * block_size} or less)")
        elif requested is None:
            changes += ["free some memory", "use a smaller model"]
        if data_type == "float32":
            changes.append("use --data-type bfloat16")
        raise InsufficientMemory(
            f"{name}: the KV cache of one sequence of {max_length} tokens needs "
            f"{format_size(blocks_per_sequence * block_bytes)} in {data_type}, but {format_size(max(budget, 0))} are "
            f"{'available' if requested is None else 'given by --kv-cache-memory'}; {' or '.join(changes)}"
        )
    return num_blocks if requested is not None else min(num_blocks, max_batch * blocks_per_sequence)
