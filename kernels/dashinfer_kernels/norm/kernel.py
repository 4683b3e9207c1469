"""RMS normalisation: whole rows in registers, read once and written once."""

import triton
import triton.language as tl

from dashinfer_kernels.quantize_rows.kernel import peaks, quantize


@triton.jit(do_not_specialize=["tokens"])
def rms_norm_kernel(
    x_ptr,  # [tokens, HIDDEN]
    residual_ptr,  # [tokens, HIDDEN] float32, contiguous; unused without USE_RESIDUAL
    weight_ptr,  # [HIDDEN]
    out_ptr,  # [tokens, HIDDEN], contiguous; int8 or float8 with USE_SCALES
    scales_ptr,  # [tokens] float32; unused without USE_SCALES
    tokens,
    x_stride,  # elements between rows of x
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    USE_RESIDUAL: tl.constexpr,
    USE_SCALES: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_HIDDEN)[None, :]
    mask = (rows < tokens) & (columns < HIDDEN)

    weight = tl.load(weight_ptr + columns, mask=columns < HIDDEN, other=0.0, eviction_policy="evict_last").to(tl.float32)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if USE_RESIDUAL:
        places = residual_ptr + rows * HIDDEN + columns
        x += tl.load(places, mask=mask, other=0.0)
        tl.store(places, x, mask=mask)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / HIDDEN + eps)
    out = x * scale * weight
    if USE_SCALES:
        out, scales = quantize(out, out_ptr.dtype.element_ty, peaks(out))
        tl.store(scales_ptr + rows, scales, mask=rows < tokens)
    tl.store(out_ptr + rows * HIDDEN + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
