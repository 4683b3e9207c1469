"""Public functions of the gated activations."""

from torch import Tensor

from dashinfer_kernels.activation import cpu, reference


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate_up: [tokens, 2 * intermediate], the gate in the first half of each row.

    Returns:
        [tokens, intermediate], the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0
    return (cpu if gate_up.device.type == "cpu" else reference).silu_mul(gate_up)


def gelu_mul(gate_up: Tensor) -> Tensor:
    """`gelu(gate) * up` with the tanh approximation.

    Args:
        gate_up: [tokens, 2 * intermediate], the gate in the first half of each row.

    Returns:
        [tokens, intermediate], the type of `gate_up`.
    """
    assert gate_up.shape[-1] % 2 == 0
    return (cpu if gate_up.device.type == "cpu" else reference).gelu_mul(gate_up)
