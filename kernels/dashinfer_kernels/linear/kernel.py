"""A linear layer whose every row has the same bits however many rows there are.

An output is summed over the inputs in one order, by one program, in tiles whose sizes do not depend on the number of rows; the
kernel is not specialised on that number either. Where there are fewer rows than a tile has, the rest is computed and dropped.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # [rows, IN_FEATURES], contiguous: a descriptor of [BLOCK_ROWS, BLOCK_IN] or, without USE_DESCRIPTORS, a pointer
    weight,  # [out_features, IN_FEATURES], contiguous: a descriptor of [BLOCK_OUT, BLOCK_IN] or a pointer
    bias_ptr,  # [out_features]; unused without USE_BIAS
    out_ptr,  # [rows, out_features], contiguous
    rows,
    out_features,
    IN_FEATURES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP_ROWS: tl.constexpr,  # row tiles that share their weights in the cache
    USE_BIAS: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    in_group = GROUP_ROWS * out_tiles
    first_tile = tl.program_id(0) // in_group * GROUP_ROWS
    group_tiles = tl.minimum(row_tiles - first_tile, GROUP_ROWS)
    place = tl.program_id(0) % in_group
    first_row = (first_tile + place % group_tiles) * BLOCK_ROWS
    first_out = place // group_tiles * BLOCK_OUT

    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_out + tl.arange(0, BLOCK_OUT)
    inner = tl.arange(0, BLOCK_IN)[None, :]
    # what is read beyond the last row or output is dropped, so it need only be memory of the tensors
    x_start = (row % rows).to(tl.int64)[:, None] * IN_FEATURES + inner
    weight_start = (column % out_features).to(tl.int64)[:, None] * IN_FEATURES + inner
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for begin in range(0, IN_FEATURES, BLOCK_IN):
        if USE_DESCRIPTORS:
            x_tile = x.load([first_row, begin])
            weight_tile = weight.load([first_out, begin])
        elif IN_FEATURES % BLOCK_IN == 0:
            x_tile = tl.load(x + begin + x_start)
            weight_tile = tl.load(weight + begin + weight_start)
        else:
            x_tile = tl.load(x + begin + x_start, mask=begin + inner < IN_FEATURES, other=0.0)
            weight_tile = tl.load(weight + begin + weight_start, mask=begin + inner < IN_FEATURES, other=0.0)
        total = tl.dot(x_tile, weight_tile.T, total, input_precision="ieee")

    if USE_BIAS:
        total += tl.load(bias_ptr + column, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    places = out_ptr + row.to(tl.int64)[:, None] * out_features + column[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < out_features)[None, :])
