"""Rotation and cache write of a few tokens as one compiled loop."""

from numba import float32, int64, uint16
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, given, narrow, shared, take, widen


@shared
def rotate(head, cos_sin):
    """A head [head_dim] in place; `cos_sin` [2, rotary_dim / 2]."""
    half = cos_sin.shape[1]
    for i in range(half):
        first, second = widen(head[i]), widen(head[half + i])
        cos, sin = cos_sin[0, i], cos_sin[1, i]
        head[i] = narrow(first * cos - second * sin)
        head[half + i] = narrow(second * cos + first * sin)


@Loop
def _rope_kv_write(work):
    """Returns a token, and one more, with a position or a slot that its table does not have."""
    _, tokens, _, qkv_ptr, positions_ptr, cos_sin_ptr, cache_ptr, slots_ptr = given(work, 8)
    num_heads, num_kv_heads, head_dim, max_positions, rotary_dim, num_blocks, block_size = given(work + 64, 7)
    num_rotated, half = num_heads + num_kv_heads, rotary_dim // 2
    qkv = array(qkv_ptr, (tokens, num_rotated + num_kv_heads, head_dim), uint16)
    positions, slots = array(positions_ptr, (tokens,), int64), array(slots_ptr, (tokens,), int64)
    cos_sins = array(cos_sin_ptr, (max_positions, 2, half), float32)
    cache = array(cache_ptr, (num_blocks, 2, num_kv_heads, block_size, head_dim), uint16)
    token = take(work)
    while token < tokens:
        position, slot = positions[token], slots[token]
        if not (0 <= position < max_positions and slot < num_blocks * block_size):
            array(work, (3,), int64)[2] = token + 1
            token = take(work)
            continue
        for head in range(num_rotated):
            rotate(qkv[token, head], cos_sins[position])
        if slot >= 0:
            block, offset = slot // block_size, slot % block_size
            for head in range(num_kv_heads):
                for i in range(head_dim):
                    cache[block, 0, head, offset, i] = qkv[token, num_heads + head, i]
                    cache[block, 1, head, offset, i] = qkv[token, num_rotated + head, i]
        token = take(work)


def rope_kv_write(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, kv_cache: Tensor, slot_mapping: Tensor, num_heads: int
) -> Tensor:
    """As the public function, without norms. Tensors are contiguous."""
    tokens = qkv.shape[0]
    num_blocks, _, num_kv_heads, block_size, head_dim = kv_cache.shape
    failed = _rope_kv_write(
        tokens,
        qkv.numel(),
        qkv.data_ptr(),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        num_heads,
        num_kv_heads,
        head_dim,
        *cos_sin.shape,
        num_blocks,
        block_size,
    )
    if failed:
        raise IndexError(f"token {failed - 1} has a position or a slot outside of its table")
    return qkv.view(tokens, -1, head_dim)[:, :num_heads]
