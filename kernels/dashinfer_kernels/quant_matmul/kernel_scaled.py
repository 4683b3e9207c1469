"""Products of 8-bit rows and 8-bit weights, scaled at the end.

int8 is summed exactly, in int32. Tensor cores sum products of float8 in fewer bits than float32 has, so sums of 128 inputs are
added up in float32 apart from them; weights with a scale a block have it applied to each of those.
"""

import triton
import triton.language as tl


@triton.jit
def _load_tile(
    source,
    first_row,
    begin,
    rows,
    in_features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_IN] of a matrix [rows, in_features]; zeros beyond its columns.

    Beyond its rows there is anything: what comes of it is dropped.
    """
    if USE_DESCRIPTORS:
        tile = source.load([first_row, begin])
    else:
        row = ((first_row + tl.arange(0, BLOCK_ROWS)) % rows).to(tl.int64)[:, None]
        column = begin + tl.arange(0, BLOCK_IN)[None, :]
        tile = tl.load(source + row * in_features + column, mask=column < in_features, other=0.0)
    return tile


@triton.jit
def _store_rows(
    total,  # [BLOCK_ROWS, BLOCK_OUT]
    x_scales_ptr,
    weight_scales_ptr,
    bias_ptr,
    out_ptr,
    row,
    column,
    rows,
    out_features,
    USE_BLOCKS: tl.constexpr,
    USE_BIAS: tl.constexpr,
):
    out = total.to(tl.float32) * tl.load(x_scales_ptr + row, mask=row < rows, other=0.0)[:, None]
    inside = column < out_features
    if not USE_BLOCKS:
        out *= tl.load(weight_scales_ptr + column, mask=inside, other=0.0)[None, :]
    if USE_BIAS:
        out += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    places = out_ptr + row.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(places, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def gemm_kernel(
    x,  # [rows, in_features], contiguous: a descriptor of [BLOCK_ROWS, BLOCK_IN] or, without USE_DESCRIPTORS, a pointer
    weight,  # [out_features, in_features], contiguous: a descriptor of [BLOCK_OUT, BLOCK_IN] or a pointer
    x_scales_ptr,  # [rows] float32
    weight_scales_ptr,  # [out_features] float32; with USE_BLOCKS [ceil(out_features / 128), ceil(in_features / 128)]
    bias_ptr,  # [out_features]; unused without USE_BIAS
    out_ptr,  # [rows, out_features], contiguous
    rows,
    out_features,
    in_features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,  # row tiles that share their weights in the cache
    USE_INT8: tl.constexpr,
    USE_BLOCKS: tl.constexpr,
    USE_BIAS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """A tile a program."""
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    in_group = GROUP_ROWS * out_tiles
    first_tile = tl.program_id(0) // in_group * GROUP_ROWS
    group_tiles = tl.minimum(row_tiles - first_tile, GROUP_ROWS)
    place = tl.program_id(0) % in_group
    first_row = (first_tile + place % group_tiles) * BLOCK_ROWS
    first_out = place // group_tiles * BLOCK_OUT

    if USE_INT8:
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.int32)
        for begin in range(0, in_features, BLOCK_IN):
            x_tile = _load_tile(x, first_row, begin, rows, in_features, BLOCK_ROWS, BLOCK_IN, USE_DESCRIPTORS)
            weight_tile = _load_tile(weight, first_out, begin, out_features, in_features, BLOCK_OUT, BLOCK_IN, USE_DESCRIPTORS)
            total = tl.dot(x_tile, weight_tile.T, total, out_dtype=tl.int32)
    else:
        # Two steps a turn: what the second adds is added in the next turn, so that tensor cores have work meanwhile.
        total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        late = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        late_factor = 1.0
        scales_ptr = weight_scales_ptr + first_out // 128 * tl.cdiv(in_features, 128)
        for begin in range(0, in_features, 2 * BLOCK_IN):
            x_tile = _load_tile(x, first_row, begin, rows, in_features, BLOCK_ROWS, BLOCK_IN, USE_DESCRIPTORS)
            weight_tile = _load_tile(weight, first_out, begin, out_features, in_features, BLOCK_OUT, BLOCK_IN, USE_DESCRIPTORS)
            part = tl.dot(x_tile, weight_tile.T)
            total += late * late_factor if USE_BLOCKS else late
            second = begin + BLOCK_IN
            x_tile = _load_tile(x, first_row, second, rows, in_features, BLOCK_ROWS, BLOCK_IN, USE_DESCRIPTORS)
            weight_tile = _load_tile(weight, first_out, second, out_features, in_features, BLOCK_OUT, BLOCK_IN, USE_DESCRIPTORS)
            late = tl.dot(x_tile, weight_tile.T)
            if USE_BLOCKS:
                total += part * tl.load(scales_ptr + begin // 128)
                late_factor = tl.load(scales_ptr + second // 128, mask=second < in_features, other=0.0)
            else:
                total += part
        total += late * late_factor if USE_BLOCKS else late

    _store_rows(
        total,
        x_scales_ptr,
        weight_scales_ptr,
        bias_ptr,
        out_ptr,
        first_row + tl.arange(0, BLOCK_ROWS),
        first_out + tl.arange(0, BLOCK_OUT),
        rows,
        out_features,
        USE_BLOCKS,
        USE_BIAS,
    )


@triton.jit
def _span(tile, tile_steps, steps, programs):
    """The programs that have a tile's first and last steps."""
    first_step = tile.to(tl.int64) * tile_steps
    opening = ((first_step + 1) * programs - 1) // steps
    closing = ((first_step + tile_steps) * programs - 1) // steps
    return opening.to(tl.int32), closing.to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def stream_kernel(
    x,  # [rows, in_features], contiguous: a descriptor of [BLOCK_ROWS, BLOCK_IN] or, without USE_DESCRIPTORS, a pointer
    weight,  # [out_features, in_features], contiguous: a descriptor of [BLOCK_OUT, BLOCK_IN] or a pointer
    x_scales_ptr,  # [rows] float32
    weight_scales_ptr,  # [out_features] float32; with USE_BLOCKS [ceil(out_features / 128), ceil(in_features / 128)]
    bias_ptr,  # [out_features]; unused without USE_BIAS
    out_ptr,  # [rows, out_features], contiguous
    partial_ptr,  # [programs, 2, BLOCK_OUT, BLOCK_ROWS] int32 or float32
    arrived_ptr,  # [programs] int32, zeros; left as zeros
    rows,
    out_features,
    in_features,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    USE_INT8: tl.constexpr,
    USE_BLOCKS: tl.constexpr,
    USE_BIAS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """An equal share of all tiles' steps a program, one step at least; tiles are transposed, outputs being the many.

    A step is BLOCK_IN inputs of a tile. A share begins and ends anywhere, so that a program has the end of one tile, whole ones
    and the beginning of another. Parts of a tile are added, in order, by whichever program is the last to be done with its own.
    Those that are done are counted at the place of the tile's first program, which has the beginning of no other.
    """
    kind: tl.constexpr = tl.int32 if USE_INT8 else tl.float32
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    tile_steps = tl.cdiv(in_features, BLOCK_IN)
    steps = row_tiles.to(tl.int64) * tl.cdiv(out_features, BLOCK_OUT) * tile_steps
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    first = (program * steps // programs).to(tl.int32)
    last = ((program + 1) * steps // programs).to(tl.int32)
    inside = tl.arange(0, BLOCK_OUT)[:, None] * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    blocks = tl.cdiv(in_features, 128)

    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=kind)
    for step in range(first, last):
        tile = step // tile_steps
        begin = step % tile_steps * BLOCK_IN
        first_row = tile % row_tiles * BLOCK_ROWS
        first_out = tile // row_tiles * BLOCK_OUT
        x_tile = _load_tile(x, first_row, begin, rows, in_features, BLOCK_ROWS, BLOCK_IN, USE_DESCRIPTORS)
        weight_tile = _load_tile(weight, first_out, begin, out_features, in_features, BLOCK_OUT, BLOCK_IN, USE_DESCRIPTORS)
        if USE_INT8:
            total = tl.dot(weight_tile, x_tile.T, total, out_dtype=tl.int32)
        elif USE_BLOCKS:
            factor = tl.load(weight_scales_ptr + first_out // 128 * blocks + begin // 128)
            total += tl.dot(weight_tile, x_tile.T) * factor
        else:
            total += tl.dot(weight_tile, x_tile.T)

        if (step + 1) % tile_steps == 0 or step + 1 == last:
            if tile * tile_steps >= first and (tile + 1) * tile_steps <= last:
                _store_rows(
                    total.T,
                    x_scales_ptr,
                    weight_scales_ptr,
                    bias_ptr,
                    out_ptr,
                    first_row + tl.arange(0, BLOCK_ROWS),
                    first_out + tl.arange(0, BLOCK_OUT),
                    rows,
                    out_features,
                    USE_BLOCKS,
                    USE_BIAS,
                )
            else:
                slot = (program * 2 + (tile * tile_steps > first).to(tl.int32)).to(tl.int64)
                tl.store(partial_ptr + slot * (BLOCK_OUT * BLOCK_ROWS) + inside, total)
            total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=kind)

    tl.debug_barrier()
    for end in range(2):
        tile = (first if end == 0 else last - 1) // tile_steps
        opening, closing = _span(tile, tile_steps, steps, programs)
        arrived = -1
        if opening < closing and (end == 0 or tile * tile_steps > first):
            arrived = tl.atomic_add(arrived_ptr + opening, 1, sem="acq_rel")
        if arrived == closing - opening:
            tl.store(arrived_ptr + opening, 0)
            # the tile is the tail of the program that has its first step, if that one began before, and the head of others
            begins_before = opening * steps // programs < tile.to(tl.int64) * tile_steps
            part_ptr = partial_ptr + opening.to(tl.int64) * (2 * BLOCK_OUT * BLOCK_ROWS) + inside
            total = tl.load(part_ptr + begins_before.to(tl.int32) * (BLOCK_OUT * BLOCK_ROWS), cache_modifier=".cg")
            for _ in range(opening, closing):
                part_ptr += 2 * BLOCK_OUT * BLOCK_ROWS
                total += tl.load(part_ptr, cache_modifier=".cg")
            _store_rows(
                total.T,
                x_scales_ptr,
                weight_scales_ptr,
                bias_ptr,
                out_ptr,
                tile % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS),
                tile // row_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT),
                rows,
                out_features,
                USE_BLOCKS,
                USE_BIAS,
            )
