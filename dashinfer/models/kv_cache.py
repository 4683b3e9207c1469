"""The paged KV cache's memory: types, size, tensors. Which sequence holds which block is the scheduler's business.

A rank keeps the key-value heads that its query heads use, in the layers of its stage: a share, or a copy of one where there are
more ranks than heads. A quantised cache has a float32 scale for each token, head, and keys or values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dashinfer.models.config import ModelConfig
from dashinfer.models.parallel import share_heads
from dashinfer.models.shapes import ALL
from dashinfer.models.stage import Stage
from dashinfer.types import DataType, KVCacheDtype

_QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class KVCache:
    """One layer's.

    Attributes:
        values: [num_blocks, 2 (keys, values), kv heads of the rank, block_size, head_dim].
        scales: [num_blocks, 2, kv heads, block_size] float32, what values are multiplied with; None: they are what they are.
    """

    values: Tensor
    scales: Tensor | None = None


def kv_dtype(kv_cache_dtype: KVCacheDtype, data_type: DataType) -> torch.dtype:
    """What a cache holds."""
    return _QUANTISED.get(kv_cache_dtype) or getattr(torch, data_type)


def kv_bytes_per_block(
    config: ModelConfig, block_size: int, dtype: torch.dtype, world_size: int, rank: int = 0, stage: Stage = ALL
) -> int:
    """Bytes that one block of `block_size` tokens takes on a rank, keys and values of its layers together, with scales."""
    heads = share_heads(config.num_heads, config.num_kv_heads, rank, world_size).num_kv_heads
    scale = torch.float32.itemsize if dtype in _QUANTISED.values() else 0
    return 2 * len(stage.layers(config.num_layers)) * heads * block_size * (config.head_dim * dtype.itemsize + scale)


def allocate_kv_cache(
    config: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    world_size: int,
    rank: int = 0,
    stage: Stage = ALL,
) -> list[KVCache]:
    """A cache a layer of the stage; one of int8 or float8_e4m3fn has scales.

    The memory is not written, so on CPU it costs nothing before it is used.
    """
    heads = share_heads(config.num_heads, config.num_kv_heads, rank, world_size).num_kv_heads
    tokens = (num_blocks, 2, heads, block_size)
    scaled = dtype in _QUANTISED.values()
    return [
        KVCache(
            torch.empty(*tokens, config.head_dim, dtype=dtype, device=device),
            torch.empty(tokens, dtype=torch.float32, device=device) if scaled else None,
        )
        for _ in stage.layers(config.num_layers)
    ]
