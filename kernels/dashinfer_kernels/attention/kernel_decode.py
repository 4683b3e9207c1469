"""Triton kernels of decode attention: `schedule` deals tiles of keys to work items, `attend` computes an item for one KV head,
`merge` adds up the sequences that were split.

The work of a step is a list of items (sequence, first tile, number of tiles), made on the device from the context lengths, so
that launch grids depend on the number of sequences only. The queries that share a KV head, of all of a sequence's tokens, are
the rows of one matrix product. An item that is all of its sequence writes the output; others leave a sum that is not yet
divided, with its maximum and its weight, in a workspace row of their own.
"""

import triton
import triton.language as tl


@triton.jit
def tile_range(context, window, QUERY_LEN: tl.constexpr, BLOCK_N: tl.constexpr, USE_WINDOW: tl.constexpr):
    """First tile that any of the last QUERY_LEN tokens sees, and the end of tiles; works on scalars and on tensors."""
    end = (context + BLOCK_N - 1) // BLOCK_N
    first = tl.maximum(context - QUERY_LEN - window + 1, 0) // BLOCK_N if USE_WINDOW else end * 0
    return first, end


@triton.jit(
    do_not_specialize=["num_sequences", "workers", "min_chunk", "window"],
    do_not_specialize_on_alignment=["context_lengths_ptr"],
)
def schedule(
    context_lengths_ptr,  # [sequences] int32
    items_ptr,  # [max_items, 4] int32: sequence, first tile, tiles, items of the sequence
    item_starts_ptr,  # [sequences + 1] int32, where each sequence's items begin
    num_sequences,
    workers,
    min_chunk,
    window,
    QUERY_LEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_OWN_LENGTH: tl.constexpr,
):
    """Items of one sequence, in as many equal pieces as keep each within the chunk.

    The chunk deals all tiles of the batch to `workers`; with USE_OWN_LENGTH, those of the sequence alone.
    """
    sequence = tl.program_id(0)
    each = tl.arange(0, BLOCK_SEQUENCES)
    contexts = tl.load(context_lengths_ptr + each, mask=each < num_sequences, other=0)
    first, end = tile_range(contexts, window, QUERY_LEN, BLOCK_N, USE_WINDOW)
    tiles = end - first
    dealt = tiles if USE_OWN_LENGTH else tl.sum(tiles, 0)
    chunk = tl.maximum((dealt + workers - 1) // workers, min_chunk)
    pieces = (tiles + chunk - 1) // chunk
    begin = tl.sum(tl.where(each < sequence, pieces, 0), 0)

    own_pieces = tl.sum(tl.where(each == sequence, pieces, 0), 0)
    own_tiles = tl.sum(tl.where(each == sequence, tiles, 0), 0)
    own_first = tl.sum(tl.where(each == sequence, first, 0), 0)
    share = own_tiles // tl.maximum(own_pieces, 1)
    longer = own_tiles - share * own_pieces
    for low in range(0, own_pieces, BLOCK_ITEMS):
        piece = low + tl.arange(0, BLOCK_ITEMS)
        record = items_ptr + (begin + piece) * 4
        kept = piece < own_pieces
        tl.store(record, sequence, mask=kept)
        tl.store(record + 1, own_first + piece * share + tl.minimum(piece, longer), mask=kept)
        tl.store(record + 2, share + (piece < longer).to(tl.int32), mask=kept)
        tl.store(record + 3, own_pieces, mask=kept)
    tl.store(item_starts_ptr + sequence, begin)
    if sequence == num_sequences - 1:
        tl.store(item_starts_ptr + num_sequences, begin + own_pieces)


@triton.jit
def tile_blocks(table_ptr, start, context, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Block numbers of a tile's tokens: one where the tile lies within a block, else [BLOCK_N]."""
    if BLOCK_SIZE >= BLOCK_N:
        blocks = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < context, other=0)
    else:
        at = start + tl.arange(0, BLOCK_N)
        blocks = tl.load(table_ptr + at.to(tl.uint32) // BLOCK_SIZE, mask=at < context, other=0)
    return blocks


@triton.jit
def nonzero(x):
    """What is not negative, to divide by; ones for zeros."""
    return tl.where(x > 0, x, 1.0)


# Four quantised values in one register to four of float16 in two.
FROM_INT8 = tl.constexpr("""{  // 128 more become the mantissa of 1024 and up; less 1024 and 128
    .reg .b32 biased, bias;
    mov.b32 bias, 0x64806480;
    xor.b32 biased, $2, 0x80808080;
    prmt.b32 $0, biased, 0x64646464, 0x4140;
    prmt.b32 $1, biased, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, bias;
    sub.f16x2 $1, $1, bias;
}""")
FROM_FLOAT8 = tl.constexpr("""{
    .reg .b16 first, second;
    mov.b32 {first, second}, $2;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
}""")
FROM_FLOAT8_BITS = tl.constexpr("""{  // the byte into the upper half of 16 bits; exponent and mantissa belong one bit lower
    .reg .b32 first, second;
    prmt.b32 first, $2, 0, 0x1404;
    prmt.b32 second, $2, 0, 0x3424;
    shr.b32 $0, first, 1;
    shr.b32 $1, second, 1;
    and.b32 $0, $0, 0x3f803f80;
    and.b32 $1, $1, 0x3f803f80;
    lop3.b32 $0, first, 0x80008000, $0, 0xea;
    lop3.b32 $1, second, 0x80008000, $1, 0xea;
}""")


@triton.jit
def to_half(stored, USE_PTX: tl.constexpr, IN_PLACE: tl.constexpr):
    """A quantised tile as float16, exactly. uint8 is float8_e4m3fn for devices that lack it, and turns into 1/256 of its value.

    With IN_PLACE, PTX that may not be moved converts values where their load left them, 16 bytes a thread: Triton would rather
    shuffle 8-bit values into the order that products along tokens need, one by one.
    """
    if USE_PTX:
        code: tl.constexpr = (
            FROM_INT8 if stored.dtype == tl.int8 else FROM_FLOAT8_BITS if stored.dtype == tl.uint8 else FROM_FLOAT8
        )
        half = tl.inline_asm_elementwise(code, "=&r,=&r,r", [stored], dtype=tl.float16, is_pure=not IN_PLACE, pack=4)
    elif stored.dtype == tl.uint8:
        bits = stored.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    else:
        half = stored.to(tl.float16)
    return half


@triton.jit(
    do_not_specialize=["num_sequences", "table_stride", "window"],
    do_not_specialize_on_alignment=["context_lengths_ptr"],
)
def attend(
    q_ptr,  # [sequences * QUERY_LEN, NUM_HEADS, HEAD_DIM], tokens q_stride apart
    kv_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    kv_scales_ptr,  # [num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE] float32
    tables_ptr,  # [sequences, blocks] int32, rows table_stride apart
    context_lengths_ptr,  # [sequences] int32
    items_ptr,  # [max_items, 4] int32
    item_starts_ptr,  # [sequences + 1] int32
    out_ptr,  # [sequences * QUERY_LEN, NUM_HEADS, HEAD_DIM]
    partial_ptr,  # [max_items, QUERY_LEN, NUM_HEADS, HEAD_DIM] float32
    stats_ptr,  # [max_items, 2, QUERY_LEN, NUM_HEADS] float32: the maximum score, and the sum of weights
    num_sequences,
    q_stride,
    table_stride,
    score_scale,  # scores to powers of two; with USE_SOFTCAP, scores to tanh's argument
    softcap,  # tanh to powers of two
    window,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_SCALES: tl.constexpr,
    USE_SOFTCAP: tl.constexpr,
    USE_WINDOW: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """One item for BLOCK_M of the queries of a KV head."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    ROW_BLOCKS: tl.constexpr = (GROUP * QUERY_LEN + BLOCK_M - 1) // BLOCK_M
    HEAD_STRIDE: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    BLOCK_STRIDE: tl.constexpr = 2 * NUM_KV_HEADS * HEAD_STRIDE
    # What `to_half` leaves to multiply with.
    UNIT: tl.constexpr = 256.0 if kv_ptr.dtype.element_ty == tl.uint8 else 1.0
    # Of float32; NVIDIA's tensor cores come close to it in three products.
    PRECISION: tl.constexpr = "tf32x3" if USE_PTX else "ieee"
    item = tl.program_id(1)
    record = items_ptr + item * 4
    count = tl.load(item_starts_ptr + num_sequences)
    sequence, first, tiles, pieces = tl.load(record), tl.load(record + 1), tl.load(record + 2), tl.load(record + 3)
    if item >= count:
        return
    kv_head = tl.program_id(0) // ROW_BLOCKS
    context = tl.load(context_lengths_ptr + sequence)
    table_ptr = tables_ptr + sequence.to(tl.int64) * table_stride
    blocks = tile_blocks(table_ptr, first * BLOCK_N, context, BLOCK_SIZE, BLOCK_N)

    row = tl.program_id(0) % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = row // GROUP, kv_head * GROUP + row % GROUP
    column = tl.arange(0, BLOCK_D)
    offset = tl.arange(0, BLOCK_N)
    kept = (row < GROUP * QUERY_LEN)[:, None] & (column < HEAD_DIM)[None, :]
    out_token = sequence.to(tl.int64) * QUERY_LEN + token
    q = tl.load(q_ptr + (out_token * q_stride + head * HEAD_DIM)[:, None] + column[None, :], mask=kept, other=0.0)
    row_scale = tl.full([BLOCK_M], score_scale, tl.float32)
    if USE_SCALES:
        wide = q.to(tl.float32)
        q_scale = nonzero(tl.max(tl.abs(wide), 1))
        q = (wide / q_scale[:, None]).to(tl.float16)
        row_scale *= q_scale * UNIT
    position = context - QUERY_LEN + token
    oldest = context - QUERY_LEN - window + 1

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr = kv_ptr + kv_head * HEAD_STRIDE
    for tile in range(first, first + tiles):
        at = tile * BLOCK_N + offset
        live = at < context
        if USE_WINDOW:
            live &= at >= oldest
        slot = at & (BLOCK_SIZE - 1)
        address = (blocks.to(tl.int64) * BLOCK_STRIDE + slot * HEAD_DIM)[:, None] + column[None, :]
        loaded = live[:, None]
        if BLOCK_D != HEAD_DIM:
            loaded &= (column < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + address, mask=loaded, other=0.0)
        v = tl.load(k_ptr + NUM_KV_HEADS * HEAD_STRIDE + address, mask=loaded, other=0.0)
        if USE_SCALES:
            scale_ptr = kv_scales_ptr + blocks.to(tl.int64) * (2 * NUM_KV_HEADS * BLOCK_SIZE) + (kv_head * BLOCK_SIZE + slot)
            k_scale = tl.load(scale_ptr, mask=live, other=0.0)
            v_scale = tl.load(scale_ptr + NUM_KV_HEADS * BLOCK_SIZE, mask=live, other=0.0)
            k = to_half(k, USE_PTX, IN_PLACE=False)
            v = to_half(v, USE_PTX, IN_PLACE=True)
        # The next tile's blocks, so that its keys need not wait for them.
        blocks = tile_blocks(table_ptr, (tile + 1) * BLOCK_N, context, BLOCK_SIZE, BLOCK_N)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * row_scale[:, None]
        if USE_SCALES:
            scores *= k_scale[None, :]
        if USE_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
        seen = live[None, :]
        if QUERY_LEN > 1:
            seen &= at[None, :] <= position[:, None]
            if USE_WINDOW:
                seen &= at[None, :] > (position - window)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        base = new_maximum
        if QUERY_LEN > 1:
            base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        p = tl.exp2(scores - base[:, None])
        decay = tl.exp2(maximum - base)
        maximum = new_maximum
        weight = weight * decay[:, None] + p
        acc = acc * decay[:, None]
        if USE_SCALES:
            # Weights times scales may be too small for float16; over the tile's largest scale they are not.
            tile_scale = nonzero(tl.max(v_scale, 0))
            p = p * (v_scale / tile_scale)[None, :]
            acc += tl.dot(p.to(v.dtype), v) * (tile_scale * UNIT)
        else:
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    total = tl.sum(weight, 1)
    if pieces == 1:
        acc = acc / nonzero(total)[:, None]
        target = out_ptr + ((out_token * NUM_HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=kept)
    else:
        partial_row = item.to(tl.int64) * (QUERY_LEN * NUM_HEADS) + token * NUM_HEADS + head
        tl.store(partial_ptr + (partial_row * HEAD_DIM)[:, None] + column[None, :], acc, mask=kept)
        stat = stats_ptr + item.to(tl.int64) * (QUERY_LEN * NUM_HEADS) + partial_row
        tl.store(stat, maximum, mask=row < GROUP * QUERY_LEN)
        tl.store(stat + QUERY_LEN * NUM_HEADS, total, mask=row < GROUP * QUERY_LEN)


@triton.jit
def merge(
    partial_ptr,  # [max_items, QUERY_LEN, NUM_HEADS, HEAD_DIM] float32
    stats_ptr,  # [max_items, 2, QUERY_LEN, NUM_HEADS] float32
    item_starts_ptr,  # [sequences + 1] int32
    out_ptr,  # [sequences * QUERY_LEN, NUM_HEADS * HEAD_DIM]
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    BLOCK_ITEMS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """BLOCK_COLUMNS of a token's output, where its sequence was split or has no context (zeros)."""
    row = tl.program_id(0)
    sequence, token = row // QUERY_LEN, row % QUERY_LEN
    begin = tl.load(item_starts_ptr + sequence)
    end = tl.load(item_starts_ptr + sequence + 1)
    if end - begin == 1:
        return
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    kept = column < NUM_HEADS * HEAD_DIM
    head = token * NUM_HEADS + column // HEAD_DIM
    maximum = tl.full([BLOCK_COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    acc = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for low in range(begin, end, BLOCK_ITEMS):
        item = (low + tl.arange(0, BLOCK_ITEMS)).to(tl.int64)
        live = (item < end)[:, None] & kept[None, :]
        stat = stats_ptr + (item * (2 * QUERY_LEN * NUM_HEADS))[:, None] + head[None, :]
        own = tl.load(stat, mask=live, other=float("-inf"))
        weight = tl.load(stat + QUERY_LEN * NUM_HEADS, mask=live, other=0.0)
        source = (item * (QUERY_LEN * NUM_HEADS * HEAD_DIM))[:, None] + (token * NUM_HEADS * HEAD_DIM + column)[None, :]
        partial = tl.load(partial_ptr + source, mask=live, other=0.0)
        new_maximum = tl.maximum(maximum, tl.max(own, 0))
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        decay = tl.exp2(maximum - base)
        factor = tl.exp2(own - base[None, :])
        total = total * decay + tl.sum(factor * weight, 0)
        acc = acc * decay + tl.sum(factor * partial, 0)
        maximum = new_maximum
    acc = acc / nonzero(total)
    tl.store(out_ptr + row.to(tl.int64) * (NUM_HEADS * HEAD_DIM) + column, acc.to(out_ptr.dtype.element_ty), mask=kept)
