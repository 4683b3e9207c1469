"""QK-norm, rotation and cache write in one pass over the projection.

A row is one head of one token, and programs take rows as they lie in memory, so that heads of any number divide evenly.
Queries, keys and values go through the same arithmetic: a value's norm is 1 and its angle is 0, which changes nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _store_dtype(x, ptr):
    """float32 to the type behind `ptr`; to int8 rounded to the nearest, ties to even."""
    if ptr.dtype.element_ty == tl.int8:
        # Adding 1.5 * 2^23 leaves no bits for a fraction.
        x = (x + 12582912.0) - 12582912.0
    return x.to(ptr.dtype.element_ty)


@triton.jit
def _angles(position_ptr, inside, cos_sin_ptr, half, mask, ROTARY_DIM: tl.constexpr):
    """Cosines and sines of each row's position; of an angle of 0 where `mask` is false."""
    position = tl.load(position_ptr, mask=inside, other=0).to(tl.int64)
    places = cos_sin_ptr + position * ROTARY_DIM + half
    return tl.load(places, mask=mask, other=1.0), tl.load(places + ROTARY_DIM // 2, mask=mask, other=0.0)


@triton.jit
def _norm_weight(q_norm_ptr, k_norm_ptr, columns, mask, is_q, is_v):
    """Each row's weights: of the query norm, of the key norm, or 1 for values."""
    q_weight = tl.load(q_norm_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    k_weight = tl.load(k_norm_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(is_v, 1.0, tl.where(is_q, q_weight, k_weight))


@triton.jit(do_not_specialize=["tokens", "positions_stride"])
def rope_kv_write_kernel(
    qkv_ptr,  # [tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM], contiguous; queries are rotated in place
    positions_ptr,  # [tokens] int64, or [3, tokens] with USE_MROPE
    cos_sin_ptr,  # [max_positions, ROTARY_DIM] float32, contiguous
    kv_cache_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM], contiguous
    kv_scales_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE] float32, contiguous; unused without USE_SCALES
    slot_mapping_ptr,  # [tokens] int64
    q_norm_ptr,  # [HEAD_DIM]; unused without USE_NORM
    k_norm_ptr,  # [HEAD_DIM]; unused without USE_NORM
    tokens,
    positions_stride,  # elements between the three rows of positions
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # at least ROTARY_DIM / 2
    BLOCK_REST: tl.constexpr,  # at least HEAD_DIM - ROTARY_DIM; 0: there is none
    SECTION_T: tl.constexpr,  # frequencies of the temporal, height and width positions
    SECTION_H: tl.constexpr,
    SECTION_W: tl.constexpr,
    LARGEST: tl.constexpr,  # of the cache's type
    USE_NORM: tl.constexpr,
    USE_MROPE: tl.constexpr,
    USE_INTERLEAVED: tl.constexpr,
    USE_SCALES: tl.constexpr,
):
    heads: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    half_dim: tl.constexpr = ROTARY_DIM // 2
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    token, head = rows // heads, rows % heads
    inside = token < tokens
    is_q, is_v = head < NUM_HEADS, head >= NUM_HEADS + NUM_KV_HEADS
    half = tl.arange(0, BLOCK_HALF)[None, :]
    rest = ROTARY_DIM + tl.arange(0, BLOCK_REST if BLOCK_REST else 1)[None, :]
    in_half, in_rest = inside & (half < half_dim), inside & (rest < HEAD_DIM)

    slot = tl.load(slot_mapping_ptr + token, mask=inside & (head >= NUM_HEADS), other=-1).to(tl.int64)
    x_ptr = qkv_ptr + rows.to(tl.int64) * HEAD_DIM
    first = tl.load(x_ptr + half, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half_dim + half, mask=in_half, other=0.0).to(tl.float32)
    if BLOCK_REST:
        third = tl.load(x_ptr + rest, mask=in_rest, other=0.0).to(tl.float32)

    # A position chosen for each column would make its angle's address a gather, so all three are read and the angles chosen.
    turns = in_half & (head < NUM_HEADS + NUM_KV_HEADS)
    cos, sin = _angles(positions_ptr + token, inside, cos_sin_ptr, half, turns, ROTARY_DIM)
    if USE_MROPE:
        if USE_INTERLEAVED:
            by_height = (half % 3 == 1) & (half < 3 * SECTION_H)
            by_width = (half % 3 == 2) & (half < 3 * SECTION_W)
        else:
            by_height = (half >= SECTION_T) & (half < SECTION_T + SECTION_H)
            by_width = half >= SECTION_T + SECTION_H
        other_cos, other_sin = _angles(positions_ptr + positions_stride + token, inside, cos_sin_ptr, half, turns, ROTARY_DIM)
        cos, sin = tl.where(by_height, other_cos, cos), tl.where(by_height, other_sin, sin)
        other_cos, other_sin = _angles(
            positions_ptr + 2 * positions_stride + token, inside, cos_sin_ptr, half, turns, ROTARY_DIM
        )
        cos, sin = tl.where(by_width, other_cos, cos), tl.where(by_width, other_sin, sin)

    if USE_NORM:
        squares = tl.sum(first * first + second * second, 1, keep_dims=True)
        if BLOCK_REST:
            squares += tl.sum(third * third, 1, keep_dims=True)
        scale = tl.where(is_v, 1.0, tl.rsqrt(squares / HEAD_DIM + eps))
        first *= scale * _norm_weight(q_norm_ptr, k_norm_ptr, half, half < half_dim, is_q, is_v)
        second *= scale * _norm_weight(q_norm_ptr, k_norm_ptr, half_dim + half, half < half_dim, is_q, is_v)
        if BLOCK_REST:
            third *= scale * _norm_weight(q_norm_ptr, k_norm_ptr, rest, rest < HEAD_DIM, is_q, is_v)

    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin

    tl.store(x_ptr + half, turned_first.to(qkv_ptr.dtype.element_ty), mask=in_half & is_q)
    tl.store(x_ptr + half_dim + half, turned_second.to(qkv_ptr.dtype.element_ty), mask=in_half & is_q)
    if BLOCK_REST and USE_NORM:
        tl.store(x_ptr + rest, third.to(qkv_ptr.dtype.element_ty), mask=in_rest & is_q)

    written = slot >= 0
    place = (slot // BLOCK_SIZE * (2 * NUM_KV_HEADS) + (head - NUM_HEADS)) * BLOCK_SIZE + slot % BLOCK_SIZE
    if USE_SCALES:
        largest = tl.max(tl.maximum(tl.abs(turned_first), tl.abs(turned_second)), 1, keep_dims=True)
        if BLOCK_REST:
            largest = tl.maximum(largest, tl.max(tl.abs(third), 1, keep_dims=True))
        scale = tl.maximum(largest, 1e-12) / LARGEST
        tl.store(kv_scales_ptr + place, scale, mask=written)
        turned_first /= scale
        turned_second /= scale
        if BLOCK_REST:
            third /= scale
    cell_ptr = kv_cache_ptr + place * HEAD_DIM
    tl.store(cell_ptr + half, _store_dtype(turned_first, kv_cache_ptr), mask=in_half & written)
    tl.store(cell_ptr + half_dim + half, _store_dtype(turned_second, kv_cache_ptr), mask=in_half & written)
    if BLOCK_REST:
        tl.store(cell_ptr + rest, _store_dtype(third, kv_cache_ptr), mask=in_rest & written)
