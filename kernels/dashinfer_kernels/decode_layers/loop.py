"""All layers as one compiled loop: threads meet five times a layer, rather than come and go for each of its ops.

What every thread needs of a row, the residual stream and its norm, it computes by itself, which is quicker than to wait for
another; products, heads and activations are dealt. Nothing is allocated here: where that fails a thread ends, and the others
would wait for it for ever.
"""

import numpy as np
from numba import float32, int32, int64, uint16

from dashinfer_kernels.activation.cpu_loop import silu_mul_row
from dashinfer_kernels.attention.cpu_loop import attend, has_blocks
from dashinfer_kernels.compiled import Loop, array, as_float, call, float_bits, given, meet, narrow, shared, take
from dashinfer_kernels.norm.cpu_loop import add_rms_norm_row
from dashinfer_kernels.quant_matmul.cpu_tile_loop import multiply_block_rows, multiply_rows, sum_groups
from dashinfer_kernels.quant_matmul.tile_product import BLOCK, TILE
from dashinfer_kernels.rope.cpu_loop import rotate

__all__ = ["LINE", "PHASES", "decode", "float_bits"]

LINEAR = 6  # numbers of a linear layer: the addresses of tiles and of the bias, or 0, groups, planes, inputs, outputs
WIDE = 4  # planes of weights in bfloat16, whose tiles are the blocks of `linear.cpu.PackedLinear`
LAYER = 4 * LINEAR + 4  # of a layer: its linear ones, the addresses of its norms and cache, its window
PHASES = 5  # of a layer, in which work is dealt: each thread has a share of it, and then takes of the others'
LINE = 64  # bytes between the numbers of next tasks, so that threads do not wait for one another's
_RUN = 1 << 15  # bytes of codes that a thread takes at a time
_DEPTH = 1 << 10  # pairs of inputs that a block is multiplied in at a time, to stay in the cache for more rows than one


@shared
def _width(linear):
    """Outputs of a tile."""
    return BLOCK if linear[3] == WIDE else TILE


@shared
def _bytes(linear):
    """Of a tile."""
    groups, planes, inputs = linear[2], linear[3], linear[4]
    if planes == WIDE:
        return -(-inputs // 32) * 64 * BLOCK
    return groups * (inputs * planes // 8 // groups + 1) * TILE * 4


@shared
def _tile(linear, tile, x, sums, products, rows):
    """Products with a tile, to `products` [rows, width]."""
    groups, planes, inputs, width = linear[2], linear[3], linear[4], products.shape[1]
    weights = linear[0] + tile * _bytes(linear)
    # addresses are taken here, since arrays live as long as they are used
    of, to = np.int64(sums.ctypes.data), np.int64(products.ctypes.data)
    if planes == WIDE:
        products[:] = 0
        for first in range(0, inputs // 2, _DEPTH):
            count = min(_DEPTH, inputs // 2 - first)
            multiply_block_rows(weights + first * 4 * BLOCK, x + first * 4, to, rows, 2 * inputs, count)
    else:
        multiply_rows(weights, x, of, groups, inputs * planes // 8 // groups, to, rows, inputs, planes)
    if linear[1]:
        outputs = min(width, linear[5] - tile * width)
        bias = array(linear[1] + tile * width * 4, (outputs,), float32)
        for row in range(rows):
            for i in range(outputs):
                products[row, i] += bias[i]


@shared
def _tiles_at_once(linear):
    return max(1, _RUN // _bytes(linear))


@shared
def _sum_inputs(linear, x, sums, rows):
    groups, inputs = linear[2], linear[4]
    if linear[3] != WIDE:
        sum_groups(array(x, (rows, groups, inputs // groups), uint16), sums[: rows * groups].reshape((rows, groups)))


@shared
def _multiply(work, linear, x, sums, products, out, rows):
    """A product of `x` [rows, inputs], to `out` [rows, outputs]; the threads' tasks are tiles."""
    _sum_inputs(linear, x, sums, rows)
    tasks, thread, shares = work
    width = _width(linear)
    tiles, run, of = -(-linear[5] // width), _tiles_at_once(linear), products[0, : rows * width].reshape((rows, width))
    for turn in range(shares):
        share = (thread + turn) % shares
        begin, end, counter = tiles * share // shares, tiles * (share + 1) // shares, tasks + share * LINE
        first = begin + take(counter) * run
        while first < end:
            for tile in range(first, min(end, first + run)):
                _tile(linear, tile, x, sums, of, rows)
                for start in range(0, min(width, linear[5] - tile * width), TILE):
                    for row in range(rows):
                        for i in range(TILE):
                            out[row, tile * width + start + i] = narrow(of[row, start + i])
            first = begin + take(counter) * run


@shared
def _multiply_gated(work, linear, x, sums, products, sides, out, rows):
    """As `_multiply`, of gates and what they are for, to `out` [rows, outputs / 2]; `sides` [2, TILE] is scratch."""
    _sum_inputs(linear, x, sums, rows)
    tasks, thread, shares = work
    width = _width(linear)
    tiles, run, size = linear[5] // 2 // width, _tiles_at_once(linear), rows * width
    gates, others = products[0, :size].reshape((rows, width)), products[1, :size].reshape((rows, width))
    for turn in range(shares):
        share = (thread + turn) % shares
        begin, end, counter = tiles * share // shares, tiles * (share + 1) // shares, tasks + share * LINE
        first = begin + take(counter) * run
        while first < end:
            for tile in range(first, min(end, first + run)):
                _tile(linear, tile, x, sums, gates, rows)
                _tile(linear, tiles + tile, x, sums, others, rows)
                for start in range(0, width, TILE):
                    for row in range(rows):
                        for i in range(TILE):
                            sides[0, i] = narrow(gates[row, start + i])
                            sides[1, i] = narrow(others[row, start + i])
                        at = tile * width + start
                        silu_mul_row(sides[0], sides[1], out[row, at : at + TILE])
            first = begin + take(counter) * run


@shared
def _next_phase(work, tasks, team):
    """Wait until all threads have done theirs. Returns the address of the next phase's tasks."""
    first, threads, shares, give_way = team
    following = tasks + shares * LINE
    meet(work, (following - first) // (shares * LINE) * threads, give_way)
    return following


@Loop
def decode(work):
    """Returns a row, and one more, with a position, a slot or a block that its table or the cache lacks."""
    _, layers, _, layers_ptr, tasks, embedded_ptr, out_ptr, positions_ptr, slots_ptr, tables_ptr, contexts_ptr = given(work, 11)
    cos_sin_ptr, norm_ptr, qkv_ptr, attended_ptr, added_ptr, activated_ptr = given(work + 88, 6)
    stream_ptr, normed_ptr, group_sums_ptr, products_ptr, sides_ptr, heads_ptr, scores_ptr, scratch = given(work + 136, 8)
    team_size, number, give_way = given(work + 200, 3)
    rows, hidden, num_heads, num_kv_heads, head_dim, intermediate, max_positions, rotary_dim = given(work + 224, 8)
    num_blocks, block_size, table_width, most_groups, scale_bits, eps_bits, shares = given(work + 288, 7)
    thread, team = np.int64(call(number)), (tasks, np.int64(call(team_size)), shares, give_way)
    eps, scale = as_float(eps_bits), as_float(scale_bits)
    shared_heads, num_rotated = num_heads // num_kv_heads, num_heads + num_kv_heads
    table = array(layers_ptr, (layers, LAYER), int64)
    qkv = array(qkv_ptr, (rows, num_rotated + num_kv_heads, head_dim), uint16)
    flat_qkv = array(qkv_ptr, (rows, (num_rotated + num_kv_heads) * head_dim), uint16)
    attended = array(attended_ptr, (rows, num_kv_heads, shared_heads, head_dim), uint16)
    added, activated = array(added_ptr, (rows, hidden), uint16), array(activated_ptr, (rows, intermediate), uint16)
    positions, slots = array(positions_ptr, (rows,), int64), array(slots_ptr, (rows,), int64)
    tables, contexts = array(tables_ptr, (rows, table_width), int32), array(contexts_ptr, (rows,), int32)
    cos_sins = array(cos_sin_ptr, (max_positions, 2, rotary_dim // 2), float32)
    own = thread * scratch
    stream, x = array(stream_ptr + own, (rows, hidden), float32), normed_ptr + own
    normed, group_sums = array(x, (rows, hidden), uint16), array(group_sums_ptr + own, (rows * most_groups,), float32)
    products, sides = array(products_ptr + own, (2, rows * BLOCK), float32), array(sides_ptr + own, (2, TILE), uint16)
    heads = array(heads_ptr + own, (2, shared_heads, head_dim), float32)
    scores = array(scores_ptr + own, (shared_heads, table_width * block_size), float32)
    embedded = array(embedded_ptr, (rows, hidden), float32)
    for row in range(rows):
        for i in range(hidden):
            stream[row, i] = embedded[row, i]
    for layer in range(layers):
        numbers = table[layer]
        input_norm = array(numbers[4 * LINEAR], (hidden,), float32)
        mlp_norm = array(numbers[4 * LINEAR + 1], (hidden,), float32)
        cache = array(numbers[4 * LINEAR + 2], (num_blocks, 2, num_kv_heads, block_size, head_dim), uint16)
        for row in range(rows):
            add_rms_norm_row(added[row], stream[row], input_norm, eps, normed[row])
        _multiply((tasks, thread, shares), numbers[:LINEAR], x, group_sums, products, flat_qkv, rows)
        tasks = _next_phase(work, tasks, team)

        task = take(tasks)
        while task < rows * num_kv_heads:
            row, kv_head = task // num_kv_heads, task % num_kv_heads
            position, slot, end = positions[row], slots[row], contexts[row]
            begin = max(0, end - numbers[4 * LINEAR + 3])
            known = 0 <= position < max_positions and slot < num_blocks * block_size
            if known and has_blocks(tables[row], begin, end, block_size, num_blocks):
                first = kv_head * shared_heads
                for head in range(first, first + shared_heads):
                    rotate(qkv[row, head], cos_sins[position])
                rotate(qkv[row, num_heads + kv_head], cos_sins[position])
                if slot >= 0:
                    block, offset = slot // block_size, slot % block_size
                    for i in range(head_dim):
                        cache[block, 0, kv_head, offset, i] = qkv[row, num_heads + kv_head, i]
                        cache[block, 1, kv_head, offset, i] = qkv[row, num_rotated + kv_head, i]
                q, of_heads = qkv[row, first : first + shared_heads], attended[row, kv_head]
                attend(q, cache, kv_head, tables[row], begin, end, scale, heads[0], scores, heads[1], of_heads)
            else:
                array(work, (3,), int64)[2] = row + 1
            task = take(tasks)
        tasks = _next_phase(work, tasks, team)

        output = numbers[LINEAR : 2 * LINEAR]
        _multiply((tasks, thread, shares), output, attended_ptr, group_sums, products, added, rows)
        tasks = _next_phase(work, tasks, team)

        for row in range(rows):
            add_rms_norm_row(added[row], stream[row], mlp_norm, eps, normed[row])
        gate_up = numbers[2 * LINEAR : 3 * LINEAR]
        _multiply_gated((tasks, thread, shares), gate_up, x, group_sums, products, sides, activated, rows)
        tasks = _next_phase(work, tasks, team)

        down = numbers[3 * LINEAR : 4 * LINEAR]
        _multiply((tasks, thread, shares), down, activated_ptr, group_sums, products, added, rows)
        tasks = _next_phase(work, tasks, team)
    if take(tasks) == 0:
        out, final_norm = array(out_ptr, (rows, hidden), uint16), array(norm_ptr, (hidden,), float32)
        for row in range(rows):
            add_rms_norm_row(added[row], stream[row], final_norm, eps, out[row])
