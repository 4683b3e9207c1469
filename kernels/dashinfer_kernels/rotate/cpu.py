"""Rotation on CPU: both halves times the cosines, plus the swapped halves times the signed sines, in float32.

Deterministic mode multiplies and adds one after the other, since whether torch fuses the two may change with an
element's place.
"""

import torch
from torch import Tensor

from dashinfer_kernels import dispatch


def rotate_heads(heads: Tensor, angles: Tensor) -> None:
    wide = torch.promote_types(heads.dtype, torch.float32)
    cos, sin = angles.to(wide)[:, None, None].chunk(2, -1)
    signed = torch.cat((-sin, sin), 2)
    halves = heads.to(wide).unflatten(-1, (2, heads.shape[2] // 2))
    turned = torch.mul(halves, cos)
    if dispatch.deterministic:
        turned.add_(halves.flip(2).mul_(signed))
    else:
        turned.addcmul_(halves.flip(2), signed)
    heads.copy_(turned.flatten(2))
