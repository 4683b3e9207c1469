"""The paged KV cache's memory: its size and its tensors. Which sequence holds which block is the scheduler's business.

A rank keeps the key-value heads that its query heads use: an even share, or one copy of a head where there are more ranks than
heads.
"""

import torch
from torch import Tensor

from dashinfer.models.config import ModelConfig
from dashinfer.models.parallel import local_kv_heads


def kv_bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype, world_size: int) -> int:
    """Bytes that one block of `block_size` tokens takes on each rank, keys and values of all layers together."""
    heads = local_kv_heads(config.num_kv_heads, world_size)
    return 2 * config.num_layers * heads * block_size * config.head_dim * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device, world_size: int
) -> list[Tensor]:
    """A tensor a layer: [num_blocks, 2 (keys, values), kv heads of the rank, block_size, head_dim].

    The memory is not written, so on CPU it costs nothing before it is used.
    """
    shape = (num_blocks, 2, local_kv_heads(config.num_kv_heads, world_size), block_size, config.head_dim)
    return [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
