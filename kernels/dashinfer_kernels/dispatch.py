"""Which path an op takes, and whether its results may depend on what else is in the batch."""

from torch import Tensor

interpreting = False  # tests set it: CPU tensors then take the Triton path, under Triton's interpreter
deterministic = False  # set once at start: launch parameters then depend on the model's shapes alone


def use_triton(x: Tensor) -> bool:
    """Whether the op's Triton kernels run for this tensor, rather than its CPU path."""
    return interpreting or x.is_cuda
