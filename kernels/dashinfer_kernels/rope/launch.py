"""Public function of the rotary embedding and the cache write."""

import torch
from torch import Tensor

from dashinfer_kernels.rope import cpu, reference


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Split the projection of queries, keys and values, norm and rotate queries and keys, write keys and values to the cache.

    Args:
        qkv: [tokens, (num_heads + 2 * num_kv_heads) * head_dim], contiguous; queries, then keys, then values. Overwritten.
        positions: [tokens] int64, each token's place in its sequence. This, `cos_sin` and `slot_mapping` are not changed in
            place between layers or steps: a new step brings new tensors.
        cos_sin: [max_positions, rotary_dim] float32, cosines in the first half; rotary_dim is even and at most head_dim,
            and dimensions beyond it are not rotated.
        kv_cache: [num_blocks, 2, num_kv_heads, block_size, head_dim], keys and then values of each block; written in place.
        slot_mapping: [tokens] int64, block * block_size + offset, no slot twice.
        q_norm: [head_dim], an RMS norm over each query head before the rotation; given together with `k_norm`.
        k_norm: [head_dim], the same for keys.
        eps: of those norms.

    Returns:
        The rotated queries, [tokens, num_heads, head_dim], the type of `qkv`; may be a view of `qkv`, with gaps between tokens.

    Raises:
        IndexError: a position or slot outside of its table (on CPU).
    """
    tokens = qkv.shape[0]
    assert qkv.shape == (tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    assert positions.shape == slot_mapping.shape == (tokens,)
    assert cos_sin.shape[1] <= head_dim
    assert cos_sin.shape[1] % 2 == 0
    assert cos_sin.dtype == torch.float32
    assert kv_cache.shape[1:3] == (2, num_kv_heads)
    assert kv_cache.shape[4] == head_dim
    assert (q_norm is None) == (k_norm is None)
    return (cpu if qkv.device.type == "cpu" else reference).rope_kv_write(
        qkv,
        positions,
        cos_sin,
        kv_cache,
        slot_mapping,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
    )
