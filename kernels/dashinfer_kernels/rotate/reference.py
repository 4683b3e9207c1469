"""Definition of the rotation: the first half of each head's dimensions turns against the second (arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotate_heads(heads: Tensor, angles: Tensor) -> None:
    """In at least float32, rounded once."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    cos, sin = angles.to(wide.dtype).unsqueeze(1).chunk(2, -1)
    first, second = wide.chunk(2, -1)
    heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
