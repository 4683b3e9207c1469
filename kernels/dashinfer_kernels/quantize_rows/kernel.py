"""Quantisation of rows: whole rows in registers, read once and written once."""

import triton
import triton.language as tl


@triton.jit
def quantize(x, dtype: tl.constexpr, peak):
    """A part of rows in `dtype`, and their scales.

    Args:
        x: [rows, columns] float32.
        dtype: int8 or float8e4nv.
        peak: [rows, 1], the rows' greatest magnitudes.

    Returns:
        values: [rows, columns] of `dtype`.
        scales: [rows, 1] float32.
    """
    greatest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    peak = tl.where(peak > 0, tl.maximum(peak, 1e-30), greatest)
    # Rounded as IEEE has it: Triton's own division is an ulp off now and then, and then ties are none.
    values = x * tl.div_rn(tl.zeros_like(peak) + greatest, peak)
    if dtype == tl.int8:
        # Adding 1.5 * 2^23 leaves no bits for a fraction.
        values = (values + 12582912.0) - 12582912.0
    return values.to(dtype), peak / greatest


@triton.jit
def peaks(x):
    """[rows, columns] -> [rows, 1], the greatest magnitudes."""
    return tl.max(tl.abs(x), 1, keep_dims=True)


@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x_ptr,  # [rows, COLUMNS]
    values_ptr,  # [rows, COLUMNS] int8 or float8, contiguous
    scales_ptr,  # [rows] float32
    rows,
    x_stride,  # elements between rows of x
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    mask = (row < rows) & (column < COLUMNS)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    values, scales = quantize(x, values_ptr.dtype.element_ty, peaks(x))
    tl.store(values_ptr + row * COLUMNS + column, values, mask=mask)
    tl.store(scales_ptr + row, scales, mask=row < rows)
