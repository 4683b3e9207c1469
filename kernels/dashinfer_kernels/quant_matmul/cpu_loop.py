"""4-bit codes to bfloat16 values in one compiled loop."""

import numpy as np
from numba import uint8, uint16
from torch import Tensor

from dashinfer_kernels.compiled import Loop, array, given, narrow, take, widen

_WIDEST = 64  # outputs of the 4-bit kernel's tiles, at most


@Loop
def _unpack_nibbles(work):
    _, tasks, _, codes_ptr, scales_ptr, out_ptr, first, tiles, inputs, outputs, group, half = given(work, 12)
    groups = inputs // group
    codes = array(codes_ptr, (tiles, inputs, half), uint8)
    scales = array(scales_ptr, (groups, outputs, 2), uint16)
    out = array(out_ptr, (inputs, tiles, 2, half), uint16)
    # [below or above, output]: the scale, and what code 0 stands for
    factors, zeros = np.empty((2, _WIDEST), np.float32), np.empty((2, _WIDEST), np.float32)
    task = take(work)
    while task < tasks:
        tile, start = task // groups, task % groups * group
        for side in range(2):
            for j in range(half):
                output = ((first + tile) * 2 + side) * half + j
                factors[side, j] = widen(scales[start // group, output, 0])
                zeros[side, j] = widen(scales[start // group, output, 1]) - np.float32(8) * factors[side, j]
        for i in range(start, start + group):
            for j in range(half):
                pair = np.int32(codes[tile, i, j])
                out[i, tile, 0, j] = narrow(np.float32(pair & 15) * factors[0, j] + zeros[0, j])
                out[i, tile, 1, j] = narrow(np.float32(pair >> 4) * factors[1, j] + zeros[1, j])
        task = take(work)


def unpack_nibbles(pairs: Tensor, scales: Tensor, first: int, group: int, out: Tensor) -> None:
    """Values of some tiles of the 4-bit kernel's layout.

    Args:
        pairs: [tiles, inputs, tile // 2] uint8, contiguous.
        scales: [groups, outputs, 2] bfloat16, contiguous: scales, and what code 8 stands for; of all outputs.
        first: which tile of the layer is the first.
        group: inputs that share a scale.
        out: [inputs, tiles * tile] bfloat16, contiguous, where the values go.
    """
    tiles, inputs, half = pairs.shape
    addresses = pairs.data_ptr(), scales.data_ptr(), out.data_ptr()
    tasks = tiles * (inputs // group)
    _unpack_nibbles(tasks, out.numel(), *addresses, first, tiles, inputs, scales.shape[1], group, half)
