"""Tiles of 4- and 8-bit codes times few rows, their values in bfloat16 times many, as compiled loops; see `tile_product`."""

import numpy as np
import torch
from numba import float32, uint16
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, given, narrow, shared, take, widen
from dashinfer_kernels.quant_matmul.tile_product import BLOCK, BLOCK_ROWS, TILE, multiply_block, multiply_tile, unpack_vectors

_RUN = 1 << 18  # bytes of codes that a thread takes at a time, as a rule
_DEPTH = 1024  # inputs of the values that are in the cache at a time


@shared
def sum_groups(x, sums):
    """Of bfloat16 `x` [rows, groups, size], float32 to `sums` [rows, groups]."""
    rows, groups, size = x.shape
    for row in range(rows):
        for group in range(groups):
            total = np.float32(0)
            for i in range(size):
                total += widen(x[row, group, i])
            sums[row, group] = total


@shared
def multiply_rows(codes, x, sums, groups, vectors, out, rows, inputs, planes):
    """`multiply_tile` of any number of rows; addresses, of contiguous arrays."""
    row, stride = 0, 2 * inputs
    while row < rows:
        at, of, to = x + row * stride, sums + row * groups * 4, out + row * TILE * 4
        if rows - row >= 4:
            if planes == 1:
                multiply_tile(codes, at, stride, of, groups, vectors, to, 4, 1)
            else:
                multiply_tile(codes, at, stride, of, groups, vectors, to, 4, 2)
            row += 4
        else:
            if planes == 1:
                multiply_tile(codes, at, stride, of, groups, vectors, to, 1, 1)
            else:
                multiply_tile(codes, at, stride, of, groups, vectors, to, 1, 2)
            row += 1


@Loop
def _multiply(work):
    """A task is some tiles."""
    _, tasks, _, codes, x_ptr, out_ptr, rows, inputs, outputs, groups, planes, run, wide = given(work, 13)
    vectors = inputs * planes // 8 // groups
    size, tiles = groups * (vectors + 1) * TILE * 4, -(-outputs // TILE)
    sums, products = np.empty((rows, groups), np.float32), np.empty((rows, TILE), np.float32)
    sum_groups(array(x_ptr, (rows, groups, inputs // groups), uint16), sums)
    narrow_out, wide_out = array(out_ptr, (rows, outputs), uint16), array(out_ptr, (rows, outputs), float32)
    task = take(work)
    while task < tasks:
        for tile in range(task * run, min(tiles, task * run + run)):
            # addresses are taken here, since arrays live as long as they are used
            of, to = np.int64(sums.ctypes.data), np.int64(products.ctypes.data)
            multiply_rows(codes + tile * size, x_ptr, of, groups, vectors, to, rows, inputs, planes)
            first = tile * TILE
            for row in range(rows):
                for i in range(min(TILE, outputs - first)):
                    if wide:
                        wide_out[row, first + i] = products[row, i]
                    else:
                        narrow_out[row, first + i] = narrow(products[row, i])
        task = take(work)


def multiply(x: Tensor, tiles: Tensor, outputs: int, planes: int, dtype: torch.dtype) -> Tensor:
    """A product with the codes that tiles hold.

    Args:
        x: [rows, inputs] bfloat16, contiguous.
        tiles: [outputs / 16, groups, bytes] uint8, contiguous, at an address that 64 divides.
        outputs: how many there are; the last tile may have more.
        planes: 1 for codes of four bits, 2 for eight.
        dtype: of the result, bfloat16 or float32.

    Returns:
        [rows, outputs].
    """
    rows, inputs = x.shape
    out = torch.empty(rows, outputs, dtype=dtype)
    count, groups, _ = tiles.shape
    threads = torch.get_num_threads()
    run = -(-count // (threads * max(1, tiles.numel() // (threads * _RUN))))
    addresses = tiles.data_ptr(), x.data_ptr(), out.data_ptr()
    wide = int(dtype == torch.float32)
    _multiply(-(-count // run), tiles.numel(), *addresses, rows, inputs, outputs, groups, planes, run, wide)
    return out


@shared
def multiply_block_rows(weights, x, out, rows, stride, pairs):
    """`multiply_block` of any number of rows; addresses, `out` [rows, 64] contiguous, `stride` in bytes."""
    row = 0
    while row < rows:
        at, to, left = x + row * stride, out + row * BLOCK * 4, rows - row
        if left >= 6:
            multiply_block(weights, at, stride, pairs, to, 6)
        elif left == 5:
            multiply_block(weights, at, stride, pairs, to, 5)
        elif left == 4:
            multiply_block(weights, at, stride, pairs, to, 4)
        elif left == 3:
            multiply_block(weights, at, stride, pairs, to, 3)
        elif left == 2:
            multiply_block(weights, at, stride, pairs, to, 2)
        else:
            multiply_block(weights, at, stride, pairs, to, 1)
        row += BLOCK_ROWS


@shared
def _unpack(tile, vectors, first, last, planes, out):
    """The values of a tile, of some vectors of codes, to a quarter of blocks of weights; addresses."""
    group, begin = first // vectors, first % vectors
    while first < last:
        count = min(last - first, vectors - begin)
        header = tile + group * (vectors + 1) * TILE * 4
        codes = header + (begin + 1) * TILE * 4
        if planes == 1:
            unpack_vectors(header, codes, count, out, 1)
        else:
            unpack_vectors(header, codes, count, out, 2)
        first, group, begin, out = first + count, group + 1, 0, out + count * 4 // planes * BLOCK * 4


@Loop
def _multiply_many(work):
    """A task is a share of blocks of outputs times rows, one after the other; values are unpacked to the cache for each."""
    _, shares, _, codes, x_ptr, out_ptr, rows, inputs, outputs, groups, planes, depth = given(work, 12)
    vectors = inputs * planes // 8 // groups
    tiles, blocks, parts = -(-outputs // TILE), -(-outputs // BLOCK), -(-rows // BLOCK_ROWS)
    size, out = groups * (vectors + 1) * TILE * 4, array(out_ptr, (rows, outputs), uint16)
    pairs = 4 // planes
    values, products = np.zeros((depth * pairs, BLOCK), np.uint32), np.empty((rows, BLOCK), np.float32)
    share = take(work)
    while share < shares:
        unit, end = blocks * parts * share // shares, blocks * parts * (share + 1) // shares
        while unit < end:
            block, part = unit // parts, unit % parts
            unit += min(parts - part, end - unit)
            begin, until = part * BLOCK_ROWS, min(rows, (unit - block * parts) * BLOCK_ROWS)
            products[begin:until] = 0
            for first in range(0, groups * vectors, depth):
                last = min(first + depth, groups * vectors)
                for side in range(min(BLOCK // TILE, tiles - block * (BLOCK // TILE))):
                    tile = block * (BLOCK // TILE) + side
                    at = np.int64(values.ctypes.data) + side * TILE * 4
                    _unpack(codes + tile * size, vectors, first, last, planes, at)
                at, of = np.int64(values.ctypes.data), np.int64(products.ctypes.data)
                x = x_ptr + begin * 2 * inputs + first * 4 * pairs
                multiply_block_rows(at, x, of + begin * BLOCK * 4, until - begin, 2 * inputs, (last - first) * pairs)
            for row in range(begin, until):
                for i in range(min(BLOCK, outputs - block * BLOCK)):
                    out[row, block * BLOCK + i] = narrow(products[row, i])
        share = take(work)


def multiply_many(x: Tensor, tiles: Tensor, outputs: int, planes: int) -> Tensor:
    """As `multiply`, in bfloat16: values are rounded to it, and multiplied by all rows while they are in the cache."""
    rows, inputs = x.shape
    out = torch.empty(rows, outputs, dtype=torch.bfloat16)
    addresses = tiles.data_ptr(), x.data_ptr(), out.data_ptr()
    shares, depth = torch.get_num_threads(), _DEPTH * planes // 8
    _multiply_many(shares, tiles.numel(), *addresses, rows, inputs, outputs, tiles.shape[1], planes, depth)
    return out
