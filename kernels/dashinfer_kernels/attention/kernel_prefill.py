"""Prefill attention over the paged cache: tiles of packed query rows walk along their sequence's keys with an online softmax.

A row is one query head of one token; the rows of a sequence and KV head are numbered token * GROUP + head, so a tile is full
whatever GROUP is. A key tile starts at a multiple of BLOCK_N, therefore a row's result does not depend on the tile it is in.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "prefill_kernel"]


@triton.jit(
    do_not_specialize=["table_stride", "window"],
    do_not_specialize_on_alignment=["tiles_ptr", "query_starts_ptr", "context_lengths_ptr", "block_tables_ptr"],
)
def prefill_kernel(
    q_ptr,  # [tokens, NUM_KV_HEADS * GROUP, HEAD_DIM], the last dimension contiguous
    cache_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    cache_desc,  # the cache as [rows, HEAD_DIM] in boxes of [BLOCK_N, BLOCK_D]; None unless USE_DESCRIPTOR
    scales_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE] float32; None unless USE_SCALES
    out_ptr,  # [tokens, NUM_KV_HEADS * GROUP, HEAD_DIM]
    tiles_ptr,  # [tiles, 2] int32, sequence and number of the tile within it
    query_starts_ptr,  # [sequences + 1] int32
    context_lengths_ptr,  # [sequences] int32
    block_tables_ptr,  # [sequences, table_stride] int32
    q_stride_token,
    q_stride_head,
    table_stride,
    score_scale,  # scale * log2(e); softcap * log2(e) where USE_SOFTCAP
    cap_scale,  # 2 * log2(e) * scale / softcap
    window,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_DESCRIPTOR: tl.constexpr,
    USE_SCALES: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % NUM_KV_HEADS
    sequence = tl.load(tiles_ptr + program // NUM_KV_HEADS * 2).to(tl.int64)
    tile = tl.load(tiles_ptr + program // NUM_KV_HEADS * 2 + 1)
    first_query = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - first_query
    context = tl.load(context_lengths_ptr + sequence)
    table_ptr = block_tables_ptr + sequence * table_stride

    queries, heads, valid = _rows(tile, num_queries, GROUP, BLOCK_M)
    positions = context - num_queries + tile * BLOCK_M // GROUP + queries
    dims = tl.arange(0, BLOCK_D)
    q_start = (first_query + tile * BLOCK_M // GROUP).to(tl.int64) * q_stride_token + head * GROUP * q_stride_head
    q_offsets = queries * q_stride_token + heads * q_stride_head
    q = _load(q_ptr + q_start + q_offsets[:, None] + dims[None, :], valid[:, None], dims[None, :], HEAD_DIM, BLOCK_D, True)

    first = context - num_queries + tile * BLOCK_M // GROUP
    last = tl.minimum(context - num_queries + (tile * BLOCK_M + BLOCK_M - 1) // GROUP, context - 1)
    # Keys [begin, end) are visible to some row, [full_begin, full_end) to all of them.
    begin = 0
    full_begin = 0
    end = last + 1
    full_end = (first + 1) // BLOCK_N * BLOCK_N
    oldest = 0
    if USE_WINDOW:
        oldest = tl.maximum(first - window + 1, 0)
        begin = oldest // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N) * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if USE_WINDOW:
        acc, row_max, row_sum = _visit(
            acc, row_max, row_sum, q, positions, begin, full_begin, oldest, context, head,
            cache_ptr, cache_desc, scales_ptr, table_ptr, score_scale, cap_scale, window,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
            True, USE_DESCRIPTOR, USE_SCALES, USE_WINDOW, USE_SOFTCAP, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, positions, full_begin, full_end, oldest, context, head,
        cache_ptr, cache_desc, scales_ptr, table_ptr, score_scale, cap_scale, window,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        False, USE_DESCRIPTOR, USE_SCALES, USE_WINDOW, USE_SOFTCAP, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _visit(
        acc, row_max, row_sum, q, positions, tl.maximum(full_begin, full_end), end, oldest, context, head,
        cache_ptr, cache_desc, scales_ptr, table_ptr, score_scale, cap_scale, window,
        NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, BLOCK_D,
        True, USE_DESCRIPTOR, USE_SCALES, USE_WINDOW, USE_SOFTCAP, PRECISION,
    )  # fmt: skip

    # Where rows go is worked out again, from a tile number the compiler cannot know to be the same: kept through the loops, it
    # takes the registers that decide whether they spill.
    tile = tl.load(tiles_ptr + program // NUM_KV_HEADS * 2 + 1, volatile=True)
    queries, heads, valid = _rows(tile, num_queries, GROUP, BLOCK_M)
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_start = ((first_query + tile * BLOCK_M // GROUP).to(tl.int64) * NUM_KV_HEADS + head) * GROUP * HEAD_DIM
    out_offsets = (queries * (NUM_KV_HEADS * GROUP) + heads) * HEAD_DIM
    stored = valid[:, None]
    if BLOCK_D != HEAD_DIM:
        stored = stored & (dims[None, :] < HEAD_DIM)
    tl.store(out_ptr + out_start + out_offsets[:, None] + dims[None, :], out, mask=stored)


@triton.jit
def _rows(tile, num_queries, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each row: its query, counted from the tile's first, its head within the KV head's, and whether there is such a row."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = tl.minimum(rows // GROUP, num_queries - 1) - tile * BLOCK_M // GROUP
    return queries, rows % GROUP, rows < num_queries * GROUP


@triton.jit
def _visit(
    acc, row_max, row_sum, q, positions, begin, end, oldest, context, head,
    cache_ptr, cache_desc, scales_ptr, table_ptr, score_scale, cap_scale, window,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    USE_MASK: tl.constexpr, USE_DESCRIPTOR: tl.constexpr, USE_SCALES: tl.constexpr, USE_WINDOW: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) to the softmax; without USE_MASK every row sees all of them."""
    columns = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    to_values = NUM_KV_HEADS * BLOCK_SIZE
    # A tile within one block needs one number from the block table. Numbers are read a tile ahead, so that loads of keys do
    # not wait for them; beyond the context they repeat.
    within = columns if BLOCK_N > BLOCK_SIZE else 0
    blocks = tl.load(table_ptr + tl.minimum(begin + within, context - 1) // BLOCK_SIZE)
    for start in tl.range(begin, end, BLOCK_N):
        keys = start + columns
        # Slots outside [oldest, context) may hold anything, and a weight of zero does not silence NaN.
        used = (keys >= oldest) & (keys < context)
        row = (blocks.to(tl.int64) * (2 * NUM_KV_HEADS) + head) * BLOCK_SIZE + (start + within) % BLOCK_SIZE
        slots = row if BLOCK_N > BLOCK_SIZE else row + columns
        blocks = tl.load(table_ptr + tl.minimum(start + BLOCK_N + within, context - 1) // BLOCK_SIZE)

        if BLOCK_N > BLOCK_SIZE:
            k_ptrs = cache_ptr + slots[:, None] * HEAD_DIM + dims[None, :]
        else:
            k_ptrs = cache_ptr + row * HEAD_DIM + (columns[:, None] * HEAD_DIM + dims[None, :])

        if USE_DESCRIPTOR:
            k = cache_desc.load([row.to(tl.int32), 0])
        else:
            k = _load(k_ptrs, used[:, None], dims[None, :], HEAD_DIM, BLOCK_D, USE_MASK)
        scores = tl.dot(q, k.to(q.dtype).T, input_precision=PRECISION)
        if USE_SCALES:
            if USE_MASK:
                k_scale = tl.load(scales_ptr + slots, mask=used, other=0.0)
                v_scale = tl.load(scales_ptr + slots + to_values, mask=used, other=0.0)
            else:
                k_scale = tl.load(scales_ptr + slots)
                v_scale = tl.load(scales_ptr + slots + to_values)
            scores = scores * k_scale[None, :]
        factor = score_scale
        if USE_SOFTCAP:
            scores = score_scale - 2.0 * score_scale / (tl.exp2(scores * cap_scale) + 1.0)
            factor = 1.0
        if USE_MASK:
            visible = keys[None, :] <= positions[:, None]
            if USE_WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
        shift = new_max
        if USE_MASK and USE_WINDOW:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * factor - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        row_max = new_max

        if USE_DESCRIPTOR and not USE_MASK:
            v = cache_desc.load([(row + to_values).to(tl.int32), 0])
        else:
            v = _load(k_ptrs + to_values * HEAD_DIM, used[:, None], dims[None, :], HEAD_DIM, BLOCK_D, USE_MASK)
        if USE_SCALES:
            weights = weights * v_scale[None, :]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _load(ptrs, rows, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, USE_MASK: tl.constexpr):
    """Rows of HEAD_DIM elements as rows of BLOCK_D; zero beyond HEAD_DIM and, with USE_MASK, where `rows` is false."""
    if USE_MASK:
        mask = rows
        if BLOCK_D != HEAD_DIM:
            mask = mask & (dims < HEAD_DIM)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(ptrs, mask=dims < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile
