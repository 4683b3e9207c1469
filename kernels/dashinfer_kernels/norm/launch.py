"""Public functions of RMS normalisation."""

from torch import Tensor

from dashinfer_kernels.norm import cpu, reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of each row.

    Args:
        x: [tokens, hidden].
        weight: [hidden], the type of `x`.
        eps: added to the mean square.

    Returns:
        [tokens, hidden], the type of `x`; computed in at least float32.
    """
    assert weight.shape == x.shape[-1:]
    assert weight.dtype == x.dtype
    return (cpu if x.device.type == "cpu" else reference).rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream, then norm.

    Args:
        x: [tokens, hidden], a layer's output.
        residual: [tokens, hidden], the type of `x`; left unchanged.
        weight: [hidden], the type of `x`.
        eps: added to the mean square.

    Returns:
        `(rms_norm(residual + x), residual + x)`, both [tokens, hidden].
    """
    assert residual.shape == x.shape
    assert weight.shape == x.shape[-1:]
    assert weight.dtype == x.dtype == residual.dtype
    return (cpu if x.device.type == "cpu" else reference).add_rms_norm(x, residual, weight, eps)
