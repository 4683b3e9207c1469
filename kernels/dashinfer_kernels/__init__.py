"""What decoders and vision towers are built from, sampling included, each behind one function that does not change with the
device.

An op is a folder: `reference.py` defines it in plain torch and is the specification, `kernel.py` is the Triton path of GPUs,
`cpu.py` the CPU path, and `launch.py` checks shapes and dispatches by device. On CPU alone Triton is never imported. Knows
nothing of models, weights files, requests or scheduling.
All ops are for inference: none of them records gradients on purpose, and callers run them under `torch.inference_mode()`.
"""

from dashinfer_kernels.activation.launch import gelu_mul, silu_mul
from dashinfer_kernels.attention.batch import PagedBatch
from dashinfer_kernels.attention.launch import paged_attention
from dashinfer_kernels.decode_layers.cpu import DecodeLayers, LayerParts, can_decode
from dashinfer_kernels.layer_norm.launch import add_layer_norm, layer_norm
from dashinfer_kernels.linear.launch import Linear, pack_linear
from dashinfer_kernels.loops import warm_up_loops
from dashinfer_kernels.norm.launch import add_rms_norm, rms_norm
from dashinfer_kernels.quant_matmul.launch import pack_quantized
from dashinfer_kernels.quant_matmul.quantize import quantize_float8, quantize_int
from dashinfer_kernels.quant_matmul.weight import QuantizedWeight
from dashinfer_kernels.quantize_rows.launch import quantize_rows
from dashinfer_kernels.quantized_rows import QuantizedRows
from dashinfer_kernels.rope.launch import rope_kv_write
from dashinfer_kernels.rotate.launch import rotate_heads
from dashinfer_kernels.sampling.launch import sample, warm_up_sampling
from dashinfer_kernels.sampling.state import Sampled, SamplingBatch, SamplingState
from dashinfer_kernels.threads import pin_threads, share_cores
from dashinfer_kernels.varlen_attention.launch import varlen_attention

__all__ = [
    "DecodeLayers",
    "LayerParts",
    "Linear",
    "PagedBatch",
    "QuantizedRows",
    "QuantizedWeight",
    "Sampled",
    "SamplingBatch",
    "SamplingState",
    "add_layer_norm",
    "add_rms_norm",
    "can_decode",
    "gelu_mul",
    "layer_norm",
    "pack_linear",
    "pack_quantized",
    "paged_attention",
    "pin_threads",
    "quantize_float8",
    "quantize_int",
    "quantize_rows",
    "rms_norm",
    "rope_kv_write",
    "rotate_heads",
    "sample",
    "share_cores",
    "silu_mul",
    "varlen_attention",
    "warm_up_loops",
    "warm_up_sampling",
]
