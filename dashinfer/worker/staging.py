"""Small arrays on their way between host and device without anybody waiting for a copy.

One upload is one copy, whatever the number of arrays. Pinned buffers are taken in turns, and one is only written again when the
device has done with it. On CPU an upload is a copy too, so that callers need not know the difference.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_DEPTH = 4  # uploads that may be under way
_ALIGNMENT = 32  # int32 elements: kernels are specialised on pointers that 16 divides


class Staging:
    """Pinned buffers for int32 arrays, towards `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers = [torch.empty(0, dtype=torch.int32) for _ in range(_DEPTH)]
        self._copied: list[torch.cuda.Event | None] = [None] * _DEPTH
        self._turn = 0

    def upload(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """int32 tensors on the device with the arrays' values, [len(array)] each. One copy, queued on the current stream."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-len(array) // _ALIGNMENT) * _ALIGNMENT
        out = torch.empty(end, dtype=torch.int32, device=self._device)
        self._fill(out, arrays, offsets)
        return [out[offset : offset + len(array)] for offset, array in zip(offsets, arrays, strict=True)]

    def upload_into(self, out: Tensor, array: np.ndarray) -> None:
        """Set `out`, int32 on the device and of the array's shape, behind what the current stream does with it now."""
        self._fill(out.view(-1), [array.reshape(-1)], [0])

    def _fill(self, out: Tensor, arrays: Sequence[np.ndarray], offsets: Sequence[int]) -> None:
        buffer = self._next_buffer(len(out))
        host = buffer.numpy()
        for array, offset in zip(arrays, offsets, strict=True):
            host[offset : offset + len(array)] = array
        out.copy_(buffer[: len(out)], non_blocking=True)
        if self._on_gpu:
            event = self._copied[self._turn] = torch.cuda.Event()
            event.record()

    def _next_buffer(self, size: int) -> Tensor:
        self._turn = (self._turn + 1) % _DEPTH
        if (event := self._copied[self._turn]) is not None:
            event.synchronize()
        if len(self._buffers[self._turn]) < size:
            room = max(1024, 1 << (size - 1).bit_length())
            self._buffers[self._turn] = torch.empty(room, dtype=torch.int32, pin_memory=self._on_gpu)
        return self._buffers[self._turn]


class Download:
    """Tensors on their way to host memory, queued on the current stream."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        if tensors[0].is_cuda:
            self._host = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in tensors]
            for host, each in zip(self._host, tensors, strict=True):
                host.copy_(each, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = list(tensors)

    def wait(self) -> list[Tensor]:
        """The tensors in host memory, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
