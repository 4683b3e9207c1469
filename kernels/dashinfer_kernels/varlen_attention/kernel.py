"""Triton kernel of bidirectional attention within sequences of unequal length.

A program computes BLOCK_M queries of one head of one sequence with an online softmax (Dao 2023, arXiv:2307.08691). Which
sequence that is, it finds out on the device, so a launch never waits for lengths.

Head sizes that are no power of two are computed as two parts that are: 72 and 80 as 64 + 16, 96 as 64 + 32. Padding to 128
would cost up to 1.8 times the work.
"""

import triton
import triton.language as tl

# One kernel serves all of their values: what else would be compiled when a sequence is the first of its kind.
_NUMBERS = ["num_sequences", "tiles_per_sequence", "num_heads"]
_NUMBERS += ["stride_q", "stride_q_head", "stride_k", "stride_k_head", "stride_v", "stride_v_head"]


@triton.jit
def _find_sequence(cu_seqlens_ptr, num_sequences, tile, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr):
    """(sequence, tile within it), where sequence i begins at tile cu_seqlens[i] // BLOCK_M + i.

    That leaves room for every sequence's last, partial tile, so some tiles lie wholly behind their sequence's end.
    """
    begun = 0
    for first in range(0, num_sequences, BLOCK_S):
        index = first + tl.arange(0, BLOCK_S)
        start = tl.load(cu_seqlens_ptr + index, mask=index < num_sequences, other=0)
        begun += tl.sum(((index < num_sequences) & (start // BLOCK_M + index <= tile)).to(tl.int32))
    sequence = begun - 1
    return sequence, tile - tl.load(cu_seqlens_ptr + sequence) // BLOCK_M - sequence


@triton.jit
def _load(
    base_ptr,
    stride,
    rows_left,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    USE_MASK: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_COLUMNS], zero beyond COLUMNS and, where USE_MASK, beyond the `rows_left` that exist."""
    rows = tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_COLUMNS)[None, :]
    ptrs = base_ptr + rows * stride + columns
    if USE_MASK:
        if BLOCK_COLUMNS > COLUMNS:
            return tl.load(ptrs, mask=(rows < rows_left) & (columns < COLUMNS), other=0.0)
        else:
            return tl.load(ptrs, mask=rows < rows_left, other=0.0)
    else:
        if BLOCK_COLUMNS > COLUMNS:
            return tl.load(ptrs, mask=columns < COLUMNS, other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def _attend(
    acc,
    acc_rest,
    total,
    peak,
    q,
    q_rest,
    k_ptr,
    v_ptr,
    stride_k,
    stride_v,
    keys_left,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    USE_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax: BLOCK_N keys, of which `keys_left` exist where USE_MASK."""
    k = _load(k_ptr, stride_k, keys_left, BLOCK_D, BLOCK_N, BLOCK_D, USE_MASK)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BLOCK_R > 0:
        k_rest = _load(k_ptr + BLOCK_D, stride_k, keys_left, HEAD_DIM - BLOCK_D, BLOCK_N, BLOCK_R, USE_MASK)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    if USE_MASK:
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < keys_left, scores, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    v = _load(v_ptr, stride_v, keys_left, BLOCK_D, BLOCK_N, BLOCK_D, USE_MASK)
    weights = weights.to(v.dtype)
    acc = tl.dot(weights, v, acc * decay[:, None], input_precision=PRECISION)
    if BLOCK_R > 0:
        v_rest = _load(v_ptr + BLOCK_D, stride_v, keys_left, HEAD_DIM - BLOCK_D, BLOCK_N, BLOCK_R, USE_MASK)
        acc_rest = tl.dot(weights, v_rest, acc_rest * decay[:, None], input_precision=PRECISION)
    return acc, acc_rest, total, new_peak


@triton.jit(do_not_specialize=_NUMBERS)
def varlen_attention_kernel(
    q_ptr,  # [tokens, num_heads, HEAD_DIM]
    k_ptr,  # [tokens, num_heads / GROUP, HEAD_DIM]
    v_ptr,  # [tokens, num_heads / GROUP, HEAD_DIM]
    out_ptr,  # [tokens, num_heads, HEAD_DIM], contiguous
    cu_seqlens_ptr,  # [num_sequences + 1] int32
    num_sequences,
    tiles_per_sequence,  # of the grid where not USE_SEARCH
    num_heads,
    scale_log2,  # of the scores, times log2(e)
    stride_q,  # strides of tokens and heads, in units of 8 elements
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    GROUP: tl.constexpr,  # query heads a KV head
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # BLOCK_D columns in the first part, up to BLOCK_R (may be 0) in the second
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries
    BLOCK_N: tl.constexpr,  # keys at a time
    BLOCK_S: tl.constexpr,  # sequences looked at together
    USE_SEARCH: tl.constexpr,
    PRECISION: tl.constexpr,  # of tl.dot
):
    """Grid (tiles, num_heads): tiles_per_sequence for each sequence, or as many as `_find_sequence` counts."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if USE_SEARCH:
        sequence, tile = _find_sequence(cu_seqlens_ptr, num_sequences, tile, BLOCK_M, BLOCK_S)
    else:
        sequence = tile // tiles_per_sequence
        tile = tile % tiles_per_sequence
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    first = tile * BLOCK_M
    if first >= length:
        return

    # Counted in eights, strides tell the compiler that rows are aligned for wide loads, which 72 elements alone do not.
    stride_q, stride_k, stride_v = stride_q * 8, stride_k * 8, stride_v * 8
    far_k, far_v = stride_k.to(tl.int64), stride_v.to(tl.int64)
    q_ptr += (begin + first).to(tl.int64) * stride_q + head * stride_q_head * 8
    k_ptr += begin * far_k + head // GROUP * stride_k_head * 8
    v_ptr += begin * far_v + head // GROUP * stride_v_head * 8

    queries_left = length - first
    q = _load(q_ptr, stride_q, queries_left, BLOCK_D, BLOCK_M, BLOCK_D, True)
    if BLOCK_R > 0:
        q_rest = _load(q_ptr + BLOCK_D, stride_q, queries_left, HEAD_DIM - BLOCK_D, BLOCK_M, BLOCK_R, True)
        acc_rest = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    else:
        q_rest = 0.0
        acc_rest = 0.0
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)

    whole = length // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        k_at = k_ptr + start * far_k
        v_at = v_ptr + start * far_v
        acc, acc_rest, total, peak = _attend(
            acc, acc_rest, total, peak, q, q_rest, k_at, v_at, stride_k, stride_v, BLOCK_N, scale_log2,
            HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_R, False, PRECISION,
        )  # fmt: skip
    # At most one turn. Being a loop, it copies asynchronously too, and keeps no address in a register during the one above.
    for start in tl.range(whole, length, BLOCK_N, disable_licm=True):
        k_at = k_ptr + start * far_k
        v_at = v_ptr + start * far_v
        acc, acc_rest, total, peak = _attend(
            acc, acc_rest, total, peak, q, q_rest, k_at, v_at, stride_k, stride_v, length - start, scale_log2,
            HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_R, True, PRECISION,
        )  # fmt: skip

    inverse = 1.0 / total[:, None]
    rows = tl.arange(0, BLOCK_M)[:, None]
    out_ptr += ((begin + first).to(tl.int64) * num_heads + head) * HEAD_DIM
    out_ptrs = out_ptr + rows * (num_heads * HEAD_DIM)
    columns = tl.arange(0, BLOCK_D)[None, :]
    tl.store(out_ptrs + columns, (acc * inverse).to(out_ptr.dtype.element_ty), mask=rows < queries_left)
    if BLOCK_R > 0:
        columns = tl.arange(0, BLOCK_R)[None, :]
        inside = (rows < queries_left) & (columns < HEAD_DIM - BLOCK_D)
        tl.store(out_ptrs + BLOCK_D + columns, (acc_rest * inverse).to(out_ptr.dtype.element_ty), mask=inside)
