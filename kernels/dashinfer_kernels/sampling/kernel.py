"""The sampling kernels by name, for who launches them. A step's sequence of them is in launch.py."""

from dashinfer_kernels.sampling.kernel_common import BINS
from dashinfer_kernels.sampling.kernel_cuts import bracket_kernel, gather_kernel, histogram_kernel, threshold_kernel
from dashinfer_kernels.sampling.kernel_draw import edit_kernel, finish_kernel, mass_kernel, peak_kernel, penalise_kernel
from dashinfer_kernels.sampling.kernel_logprobs import logprob_kernel, top_kernel

__all__ = [
    "BINS",
    "bracket_kernel",
    "edit_kernel",
    "finish_kernel",
    "gather_kernel",
    "histogram_kernel",
    "logprob_kernel",
    "mass_kernel",
    "peak_kernel",
    "penalise_kernel",
    "threshold_kernel",
    "top_kernel",
]
