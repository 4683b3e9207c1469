"""Tiles of 4- and 8-bit codes times a few rows, and their values in bfloat16, as compiled loops; see `tile_product`."""

import numpy as np
import torch
from numba import float32, uint16, uint32
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, given, narrow, shared, take, widen
from dashinfer_kernels.quant_matmul.tile_product import TILE, multiply_tile

_RUN = 1 << 18  # bytes of codes that a thread takes at a time, as a rule


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


@Loop
def _unpack(work):
    """A task is a group of a tile."""
    _, tasks, _, codes_ptr, out_ptr, tiles, inputs, groups, planes = given(work, 9)
    vectors = inputs * planes // 8 // groups
    codes = array(codes_ptr, (tiles, groups, vectors + 1, TILE), uint32)
    header = array(codes_ptr, (tiles, groups, vectors + 1, 2, TILE), uint16)
    out = array(out_ptr, (inputs, tiles, TILE), uint16)
    bits, middle, pairs = 4 * planes, np.float32(8 if planes == 1 else 128), 4 // planes
    mask = np.uint32((1 << bits) - 1)
    task = take(work)
    while task < tasks:
        tile, group = task // groups, task % groups
        for vector in range(vectors):
            for pair in range(pairs):
                for side in range(2):
                    at = ((group * vectors + vector) * pairs + pair) * 2 + side
                    shift = np.uint32(pair * bits + side * 16)
                    for j in range(TILE):
                        code = np.float32(np.int32((codes[tile, group, vector + 1, j] >> shift) & mask))
                        scale, zero = widen(header[tile, group, 0, 0, j]), widen(header[tile, group, 0, 1, j])
                        out[at, tile, j] = narrow((code - middle) * scale + zero)
        task = take(work)


def unpack(tiles: Tensor, planes: int, out: Tensor) -> None:
    """The values of some tiles.

    Args:
        tiles: [count, groups, bytes] uint8, contiguous.
        planes: as of `multiply`.
        out: [inputs, 16 * count] bfloat16, contiguous, where the values go.
    """
    count, groups, _ = tiles.shape
    _unpack(count * groups, out.numel(), tiles.data_ptr(), out.data_ptr(), count, len(out), groups, planes)
