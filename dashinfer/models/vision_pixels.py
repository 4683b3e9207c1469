"""Bytes of patches to a vision tower's input."""

import torch
from torch import Tensor

_ROWS = 4096  # patches whose bytes are looked up at a time


class PixelTable:
    """What each byte of each channel becomes by rescaling and normalisation."""

    def __init__(self, values: Tensor, device: torch.device, dtype: torch.dtype) -> None:
        """`values`: [channels, 256] float32."""
        channels, bytes_ = values.shape
        assert bytes_ == 256
        self._values = values.to(device, dtype).flatten()
        self._firsts = 256 * torch.arange(channels, dtype=torch.int32, device=device)[:, None]

    def __call__(self, patches: Tensor) -> Tensor:
        """[patches, patch_dim] uint8 on the table's device, channel by channel, to the same of the table's type."""
        pixels = torch.empty(patches.shape, dtype=self._values.dtype, device=patches.device)
        for part, out in zip(patches.split(_ROWS), pixels.split(_ROWS), strict=True):
            places = part.unflatten(1, (len(self._firsts), -1)) + self._firsts
            torch.index_select(self._values, 0, places.flatten(), out=out.view(-1))
        return pixels
