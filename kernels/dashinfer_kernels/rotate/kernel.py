"""Rotation of heads in place: each element is read once and written once, a token's angles once a head."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def rotate_heads_kernel(
    heads_ptr,  # [tokens, HEADS, HEAD_DIM], heads contiguous
    angles_ptr,  # [tokens, HEAD_DIM] float32, contiguous, cosines first
    tokens,
    stride,  # elements between tokens of heads
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    half_dim: tl.constexpr = HEAD_DIM // 2
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    token, head = (rows // HEADS).to(tl.int64), rows % HEADS
    half = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (token < tokens) & (half < half_dim)

    x_ptr = heads_ptr + token * stride + head * HEAD_DIM + half
    turn_ptr = angles_ptr + token * HEAD_DIM + half
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half_dim, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(turn_ptr, mask=mask, other=0.0, eviction_policy="evict_last")
    sin = tl.load(turn_ptr + half_dim, mask=mask, other=0.0, eviction_policy="evict_last")
    tl.store(x_ptr, (first * cos - second * sin).to(heads_ptr.dtype.element_ty), mask=mask)
    tl.store(x_ptr + half_dim, (second * cos + first * sin).to(heads_ptr.dtype.element_ty), mask=mask)
