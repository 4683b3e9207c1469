"""Layer normalisation: whole rows in registers, read once and written once."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def layer_norm_kernel(
    x_ptr,  # [tokens, HIDDEN]
    residual_ptr,  # [tokens, HIDDEN] float32, contiguous; unused without USE_RESIDUAL
    weight_ptr,  # [HIDDEN]
    bias_ptr,  # [HIDDEN]
    out_ptr,  # [tokens, HIDDEN], contiguous
    tokens,
    x_stride,  # elements between rows of x
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    USE_RESIDUAL: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_HIDDEN)[None, :]
    mask = (rows < tokens) & (columns < HIDDEN)

    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if USE_RESIDUAL:
        places = residual_ptr + rows * HIDDEN + columns
        x += tl.load(places, mask=mask, other=0.0)
        tl.store(places, x, mask=mask)
    centred = tl.where(columns < HIDDEN, x - tl.sum(x, 1, keep_dims=True) / HIDDEN, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / HIDDEN + eps)
    # read last: a row and its weights together would not fit in registers
    weight = tl.load(weight_ptr + columns, mask=columns < HIDDEN, other=0.0, eviction_policy="evict_last").to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < HIDDEN, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(out_ptr + rows * HIDDEN + columns, (centred * scale * weight + bias).to(out_ptr.dtype.element_ty), mask=mask)
