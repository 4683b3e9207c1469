"""Gated activations: one pass, in float32 between the load and the store."""

import triton
import triton.language as tl

from dashinfer_kernels.quantize_rows.kernel import peaks, quantize


@triton.jit
def _gated(gates, mask, INTERMEDIATE: tl.constexpr, USE_GELU: tl.constexpr):
    """The product in float32, 0 where there is none.

    Args:
        gates: pointers to gates, INTERMEDIATE before the values that they multiply.
    """
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + INTERMEDIATE, mask=mask, other=0.0).to(tl.float32)
    # (1 + tanh(a)) / 2 is sigmoid(2a); GELU's a is sqrt(2 / pi) * (gate + 0.044715 * gate^3).
    slope = 1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate) if USE_GELU else gate
    return gate * tl.sigmoid(slope) * up


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

    out = _gated(gate_up_ptr + rows * (2 * INTERMEDIATE) + columns, mask, INTERMEDIATE, USE_GELU)
    tl.store(out_ptr + rows * INTERMEDIATE + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantized_gated_kernel(
    gate_up_ptr,  # [tokens, 2 * INTERMEDIATE], contiguous
    values_ptr,  # [tokens, INTERMEDIATE] int8 or float8, contiguous
    scales_ptr,  # [tokens] float32
    INTERMEDIATE: tl.constexpr,
    BLOCK_FIRST: tl.constexpr,  # columns, as many as fit
    BLOCK_REST: tl.constexpr,  # at least as many as there are after those; 0: there are none
    USE_GELU: tl.constexpr,
):
    """A row a program, in registers from its first load to its store; rounded to the type of `gate_up` in between."""
    token = tl.program_id(0).to(tl.int64)
    gate_up = gate_up_ptr + token * (2 * INTERMEDIATE)
    columns = tl.arange(0, BLOCK_FIRST)[None, :]
    out = _gated(gate_up + columns, columns < INTERMEDIATE, INTERMEDIATE, USE_GELU).to(gate_up_ptr.dtype.element_ty)
    peak = peaks(out.to(tl.float32))
    if BLOCK_REST:
        others = BLOCK_FIRST + tl.arange(0, BLOCK_REST)[None, :]
        rest = _gated(gate_up + others, others < INTERMEDIATE, INTERMEDIATE, USE_GELU).to(gate_up_ptr.dtype.element_ty)
        peak = tl.maximum(peak, peaks(rest.to(tl.float32)))
    values, scales = quantize(out.to(tl.float32), values_ptr.dtype.element_ty, peak)
    tl.store(values_ptr + token * INTERMEDIATE + columns, values, mask=columns < INTERMEDIATE)
    if BLOCK_REST:
        values, scales = quantize(rest.to(tl.float32), values_ptr.dtype.element_ty, peak)
        tl.store(values_ptr + token * INTERMEDIATE + others, values, mask=others < INTERMEDIATE)
    tl.store(scales_ptr + token + tl.zeros((1, 1), tl.int32), scales)
