"""RMS normalisation on CPU: torch's own fused operator, which also computes in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps).to(dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(residual.add_(x), (x.shape[-1],), weight, eps).to(x.dtype)
