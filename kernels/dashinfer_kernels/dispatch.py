"""Which path an op takes."""

from torch import Tensor

interpreting = False  # tests set it: CPU tensors then take the Triton path, under Triton's interpreter


def use_triton(x: Tensor) -> bool:
    """Whether the op's Triton kernels run for this tensor, rather than its CPU path."""
    return interpreting or x.is_cuda
