"""Gated activations: one pass, in float32 between the load and the store."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def gated_kernel(
    gate_up_ptr,  # [tokens, 2 * INTERMEDIATE], contiguous
    out_ptr,  # [tokens, INTERMEDIATE], contiguous
    tokens,
    INTERMEDIATE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_GELU: tl.constexpr,
):
    # Neighbours in the grid are neighbours in a row. The grid's second dimension would end at 65535 tokens, so there is none.
    blocks: tl.constexpr = tl.cdiv(INTERMEDIATE, BLOCK_COLUMNS)
    program = tl.program_id(0)
    rows = (program // blocks * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
    columns = (program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    mask = (rows < tokens) & (columns < INTERMEDIATE)

    gates = gate_up_ptr + rows * (2 * INTERMEDIATE) + columns
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
    # (1 + tanh(a)) / 2 is sigmoid(2a); GELU's a is sqrt(2 / pi) * (gate + 0.044715 * gate^3).
    slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate) if USE_GELU else gate
    out = gate * tl.sigmoid(slope) * up
    tl.store(out_ptr + rows * INTERMEDIATE + columns, out.to(out_ptr.dtype.element_ty), mask=mask)
