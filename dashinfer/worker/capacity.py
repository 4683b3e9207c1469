"""How much memory a rank may take for the KV cache, and what else it must keep free."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dashinfer.errors import InsufficientMemory
from dashinfer.models.config import ModelConfig
from dashinfer.models.memory import available_memory, format_size
from dashinfer.models.stage import Stage
from dashinfer.models.vision_config import VisionConfig
from dashinfer.types import DataType, KVCacheDtype
from dashinfer.worker.pipeline import STEPS_UNDER_WAY

MEMORY_SHARE = 0.5  # of host memory that is available once the weights are there
# On CPU, a step's temporary tensors, generously, in bytes: for a token the greater of the first two, for a row of logits the
# last.
HIDDEN_BYTES = 32  # times hidden size
INTERMEDIATE_BYTES = 8  # times intermediate size
LOGIT_BYTES = 32  # times vocabulary
# And of a vision tower, for a patch: the sum of the two.
TOWER_HIDDEN_BYTES = 56  # times the tower's hidden size
TOWER_INTERMEDIATE_BYTES = 16  # times its intermediate size
# For the embeddings of media where nothing is asked for: at most so much, and at most this share of what is free.
MEDIA_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
MEDIA_SHARE = 0.05
LARGEST_IMAGE = 16384  # tokens, of what --max-pixels allows by default
# What torch on CPU, torch, CUDA and Triton on GPU, and cuBLAS say.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def out_of_memory(name: str, where: str) -> Iterator[None]:
    """Turns a failed allocation into the one line that a user sees, an InsufficientMemory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # CUDA's and Triton's own failures, and torch's on CPU, are RuntimeErrors like any other
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        raise InsufficientMemory(f"{name}: memory ran out {where}") from error


def free_memory(device: torch.device, local_size: int) -> int:
    """Bytes that a rank can still take on its device. The `local_size` ranks of a machine share its memory on CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory() // local_size


def step_bytes(config: ModelConfig, step_tokens: int, max_batch: int) -> int:
    """Bytes to keep for what a step of `step_tokens` tokens, `max_batch` of which sample, allocates and frees again."""
    token = max(HIDDEN_BYTES * config.hidden_size, INTERMEDIATE_BYTES * config.intermediate_size)
    return step_tokens * token + max_batch * config.vocab_size * LOGIT_BYTES


def pipeline_bytes(config: ModelConfig, step_tokens: int, stage: Stage) -> int:
    """Bytes to keep for what the stage after this one has not taken yet."""
    return 0 if stage.last else STEPS_UNDER_WAY * step_tokens * config.hidden_size * torch.float32.itemsize


def encode_bytes(vision: VisionConfig, patches: int) -> int:
    """Bytes to keep on CPU for what encoding so many patches at once allocates and frees again."""
    return patches * (TOWER_HIDDEN_BYTES * vision.hidden_size + TOWER_INTERMEDIATE_BYTES * vision.intermediate_size)


def largest_image(max_length: int) -> int:
    """Tokens of the largest image to keep memory for: no image has more that is part of a prompt."""
    return min(max_length, LARGEST_IMAGE)


def media_cache_bytes(
    name: str, *, requested: int | None, free: int, token_bytes: int, max_length: int, device: torch.device
) -> int:
    """Bytes for the embeddings of media: what was asked for, or a share of what is free, with room for one large image.

    Args:
        token_bytes: of the embeddings of one token.

    Raises:
        InsufficientMemory: more is asked for than there is.
    """
    if requested is None:
        share = min(MEDIA_BYTES[device.type], int(MEDIA_SHARE * free))
        return max(share, largest_image(max_length) * token_bytes)
    if requested > free:
        raise InsufficientMemory(
            f"{name}: --media-cache-memory asks for {format_size(requested)}, but only {format_size(free)} of memory is free; "
            "lower it, or leave it out to take what is there"
        )
    return requested


def count_blocks(
    *,
    name: str,
    data_type: DataType,
    kv_cache_dtype: KVCacheDtype,
    block_bytes: int,
    block_size: int,
    max_batch: int,
    max_length: int,
    requested: int | None,
    free: int,
    available: int,
    required: int | None = None,
) -> int:
    """How many KV cache blocks to allocate: what was asked for, or what is available up to what a full batch can use.

    Args:
        data_type, kv_cache_dtype: what the cache holds, for the message.
        block_bytes: of one block of `block_size` tokens.
        requested: bytes asked for by --kv-cache-memory.
        free: bytes there are, less what steps take.
        available: those of them that the KV cache may take where nothing is asked for; below 0 where there are none.
        required: so many blocks and no others, if they are not more than there is memory.

    Raises:
        InsufficientMemory: more is asked for than there is, or not even one sequence of `max_length` tokens fits.
    """
    if required is not None:
        if required * block_bytes > free:
            raise InsufficientMemory(
                f"{name}: the KV cache had {format_size(required * block_bytes)} before, but steps leave only "
                f"{format_size(free)} of memory free now; free some memory, or start again"
            )
        return required
    if requested is not None and requested > free:
        raise InsufficientMemory(
            f"{name}: --kv-cache-memory asks for {format_size(requested)}, but steps leave only {format_size(free)} of memory "
            "free; lower it, or leave it out to take what is there"
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
        if kv_cache_dtype == "auto":
            if data_type == "float32":
                changes.append("use --data-type bfloat16")
            changes.append("use --kv-cache-dtype int8")
        held = data_type if kv_cache_dtype == "auto" else kv_cache_dtype
        raise InsufficientMemory(
            f"{name}: the KV cache of one sequence of {max_length} tokens needs "
            f"{format_size(blocks_per_sequence * block_bytes)} in {held}, but {format_size(max(budget, 0))} are "
            f"{'available' if requested is None else 'given by --kv-cache-memory'}; {' or '.join(changes)}"
        )
    return num_blocks if requested is not None else min(num_blocks, max_batch * blocks_per_sequence)
