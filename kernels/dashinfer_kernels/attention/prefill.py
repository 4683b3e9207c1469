"""Launch of prefill attention: the order of its tiles and its launch parameters.

Owns what one step's sequences of several tokens need on the device, made once a step and used by every layer.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from dashinfer_kernels import dispatch, tuning
from dashinfer_kernels.attention.batch import PagedBatch

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class PrefillConfig:
    """Launch parameters: a tile is `block_m` packed query rows, which walk over `block_n` keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    use_descriptor: bool = False  # full tiles of keys come through a tensor descriptor; a tile must lie within one block
    maxnreg: int | None = None  # registers a thread


@dataclass(frozen=True)
class Shape:
    """What a config may depend on: of the model and, as `short`, of the step."""

    head_dim: int
    block_size: int
    quantized: bool
    wide: bool  # float32 queries
    windowed: bool
    short: bool  # tiles of 128 rows would be half empty or too few for the GPU


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    batch: PagedBatch,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    kv_scales: Tensor | None = None,
    first_sequence: int | None = None,
    config: PrefillConfig | None = None,
) -> None:
    """Attend for the tokens of the batch's later sequences; arguments are those of the op, checked by it.

    Args:
        q: [tokens, num_heads, head_dim] of the whole batch, the last dimension contiguous.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim].
        batch: the step's layout.
        out: [tokens, num_heads * head_dim], contiguous, the type of `q`; the sequences' rows are written.
        scale: above zero.
        window: positions a token sees, its own included.
        softcap: above zero.
        kv_scales: [num_blocks, 2, num_kv_heads, block_size] float32 for an int8 or float8 cache.
        first_sequence: where the sequences begin; None: after those of one token.
        config: launch parameters instead of the tuned ones.
    """
    _, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    group = q.shape[1] // num_kv_heads
    first = batch.num_decodes if first_sequence is None else first_sequence
    assert scale > 0
    assert q.stride(2) == 1 and out.is_contiguous()
    if first == batch.num_sequences:
        return
    key = ("prefill", first, q.shape[1], kv_cache.shape[2:], q.dtype, kv_cache.dtype, window is None, config)
    if key not in batch.plans:
        if config is None:
            lengths = batch.host_lengths[first:]
            tiles_of_128 = int(lengths.sum()) * q.shape[1] // 128
            short = int(lengths.max()) * group <= 64 or tiles_of_128 < _multiprocessors(q.device)
            config = choose_config(
                Shape(head_dim, block_size, kv_scales is not None, q.dtype == torch.float32, window is not None, short),
                _generation(q.device),
            )
        batch.plans[key] = config, _tiles(batch, first, group, config.block_m)
    config, tiles = batch.plans[key]

    kernel, descriptor = _kernel(), None
    block_d = 1 << (head_dim - 1).bit_length()
    if config.use_descriptor:
        assert block_size >= config.block_n
        rows_of_cache = kv_cache.view(-1, head_dim)
        assert len(rows_of_cache) < 2**31
        descriptor = kernel.TensorDescriptor.from_tensor(rows_of_cache, [config.block_n, block_d])
    kernel.prefill_kernel[(len(tiles) * num_kv_heads,)](
        q_ptr=q,
        cache_ptr=kv_cache,
        cache_desc=descriptor,
        scales_ptr=kv_scales,
        out_ptr=out,
        tiles_ptr=tiles,
        query_starts_ptr=batch.query_starts,
        context_lengths_ptr=batch.context_lengths,
        block_tables_ptr=batch.block_tables,
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        table_stride=batch.block_tables.stride(0),
        score_scale=(scale if softcap is None else softcap) * _LOG2E,
        cap_scale=0.0 if softcap is None else 2 * _LOG2E * scale / softcap,
        window=window or 0,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        USE_DESCRIPTOR=config.use_descriptor,
        USE_SCALES=kv_scales is not None,
        USE_WINDOW=window is not None,
        USE_SOFTCAP=softcap is not None,
        PRECISION="tf32x3" if q.is_cuda and torch.version.hip is None else "ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({} if config.maxnreg is None else {"maxnreg": config.maxnreg}),
    )


def choose_config(shape: Shape, generation: str) -> PrefillConfig:
    """The table's launch parameters for the GPU, else those of the heuristic; arguments are the heuristic's."""
    short = shape.short and not dispatch.deterministic
    key = (shape.head_dim, shape.block_size, int(shape.quantized), int(shape.wide), int(shape.windowed), int(short))
    found = tuning.lookup("prefill_attention", key)
    if found is not None:
        return PrefillConfig(**found)
    return heuristic_config(dataclasses.replace(shape, short=short), generation)


def heuristic_config(shape: Shape, generation: str) -> PrefillConfig:
    """Launch parameters that neither spill registers nor exceed shared memory, as the ahead-of-time compile tests hold.

    Args:
        shape: what is launched.
        generation: "ampere", "hopper" (and what came after) or "amd".
    """
    short = shape.short
    if shape.wide:
        return PrefillConfig(block_m=16, block_n=16, num_warps=4, num_stages=1)
    if generation == "amd":
        large = shape.head_dim > 128
        block_m = 64 if short or large or shape.quantized else 128
        return PrefillConfig(block_m, 32 if large else 64, num_warps=4, num_stages=1 if large else 2)
    if generation == "ampere":
        if shape.head_dim > 128:
            return PrefillConfig(64, 32, num_warps=8, num_stages=2)
        if shape.head_dim > 64:
            return PrefillConfig(64 if short else 128, 32, num_warps=8, num_stages=3)
        return PrefillConfig(64 if short else 128, 64, num_warps=4 if short else 8, num_stages=3)
    if shape.head_dim > 128:
        block_n, num_stages = 32 if shape.quantized or short else 64, 2
    elif shape.block_size >= 128 and not shape.quantized and not shape.windowed:
        block_n, num_stages = 128, 3 if shape.head_dim <= 64 else 2
    else:
        block_n, num_stages = 64, 3
    # a descriptor's rows are 16 bytes or a multiple apart
    descriptor = shape.block_size >= block_n and shape.head_dim % (16 if shape.quantized else 8) == 0
    return PrefillConfig(64 if short else 128, block_n, 4 if short else 8, num_stages, descriptor)


def _tiles(batch: PagedBatch, first: int, group: int, block_m: int) -> Tensor:
    """[tiles, 2] int32, sequence and number of the tile within it; those that see most keys come first."""
    lengths, starts = batch.host_lengths[first:], batch.host_starts[first:]
    counts = -(-lengths * group // block_m)
    sequences = np.repeat(np.arange(len(lengths)), counts)
    numbers = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    last = np.minimum(((numbers + 1) * block_m - 1) // group, lengths[sequences] - 1)
    order = np.argsort(-(starts[sequences] + last), kind="stable")
    tiles = torch.from_numpy(np.stack((sequences + first, numbers), 1)[order].astype(np.int32))
    if batch.positions.is_cuda:
        tiles = tiles.pin_memory()
    return tiles.to(batch.positions.device, non_blocking=True)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _generation(device: torch.device) -> str:
    if device.type != "cuda":
        return "hopper"  # interpreted
    if torch.version.hip is not None:
        return "amd"
    return "hopper" if torch.cuda.get_device_capability(device) >= (9, 0) else "ampere"


@functools.cache
def _kernel() -> ModuleType:
    """Imported on first use: CPU workers run without Triton."""
    from dashinfer_kernels.attention import kernel_prefill

    return kernel_prefill
