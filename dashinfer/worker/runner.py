"""Executes plans: turns a plan into the step's tensors, runs the model over the paged KV cache, and samples.

Owns a rank's model, KV cache and slots. Plans are executed strictly in order, which is all the synchronisation that the
parent's bookkeeping needs.
"""


import torch
from dashinfer_kernels import PagedBatch

from dashinfer.errors import ConfigurationError, InsufficientMemory
from dashinfer.models.config import ModelConfig
from dashinfer.models.kv_cache import allocate_kv_cache, kv_bytes_per_block
from dashinfer.models.loader import load_model
from dashinfer.models.memory import available_memory
from dashinfer.models.parallel import Group
from dashinfer.models.weights import ReportProgress
from dashinfer.types import Ready, StepPlan, StepResult, WorkerConfig
from dashinfer.worker.sampler import Sampler
from dashinfer.worker.slots import Slots

BLOCK_SIZE = {"cpu": 32, "cuda": 16}
STEP_TOKENS = {"cpu": 512, "cuda": 8192}
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.9}  # of what is available once the weights are there
ACTIVATION_BYTES_PER_TOKEN = 32  # times hidden size: a step's temporary tensors, generously


class Runner:
    """Loads the model that `config` names and is then ready for plans.

    Raises:
        StartupError: the model, the options and the machine do not go together; the message says what to change.
    """

    def __init__(self, config: WorkerConfig, model_config: ModelConfig, report: ReportProgress) -> None:
        device = select_device(config.device)
        max_length = model_config.resolve_max_length(config.max_length)
        self._device = device
        self._model = load_model(
            config, model_config, device=device, group=Group(config.rank, config.world_size), report=report
        )
        self._block_size = config.block_size or BLOCK_SIZE[device.type]
        dtype = getattr(torch, config.data_type)
        block_bytes = kv_bytes_per_block(model_config, self._block_size, dtype, config.world_size)
        step_tokens = max(config.max_step_tokens or STEP_TOKENS[device.type], config.max_batch)
        num_blocks = count_blocks(
            block_bytes=block_bytes,
            blocks_per_sequence=-(-max_length // self._block_size),
            max_batch=config.max_batch,
            max_length=max_length,
            requested=config.kv_cache_memory,
            available=int(free_memory(device) * MEMORY_SHARE[device.type])
            - step_tokens * model_config.hidden_size * ACTIVATION_BYTES_PER_TOKEN,
        )
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

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step."""
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


def select_device(name: str) -> torch.device:
    """Raises ConfigurationError when CUDA is asked for and not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigurationError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def count_blocks(
    *, block_bytes: int, blocks_per_sequence: int, max_batch: int, max_length: int, requested: int | None, available: int
) -> int:
    """How many KV cache blocks to allocate: what was asked for, or what is available up to what a full batch can use.

    Raises:
        InsufficientMemory: not even one sequence of `max_length` tokens fits.
    """
    budget = available if requested is None else requested
    num_blocks = budget // block_bytes
    if num_blocks < blocks_per_sequence:
        need = blocks_per_sequence * block_bytes / 2**20
        source = "available" if requested is None else "given by --kv-cache-memory"
        fitting = max(num_blocks, 0) * max_length // blocks_per_sequence
        raise InsufficientMemory(
            f"the KV cache of one sequence of {max_length} tokens needs {need:.0f} MiB, "
            f"but {max(budget, 0) / 2**20:.0f} MiB are {source}; "
            f"lower --max-length (to {fitting} or less)" + ("" if requested is None else " or raise --kv-cache-memory")
        )
    return num_blocks if requested is not None else min(num_blocks, max_batch * blocks_per_sequence)
