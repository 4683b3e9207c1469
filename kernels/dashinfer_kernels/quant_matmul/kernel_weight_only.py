"""Products of activations of 16 or 32 bits with weights of 4 or 8, which become numbers in registers.

The weights are the left operand of the product: on Hopper the tensor cores take that one from registers, so that weights pass
through shared memory once, as they are stored. A 16-bit word holds one code of each of PLACES runs of columns; a shift and a
mask then leave a tile of weights whose columns follow one another, and which meets a plain tile of activations. A pair of words
becomes a pair of weights by bits alone: a code is put in the mantissa of a power of two, which is subtracted.

Three ways to scale. Sums: integers are multiplied exactly, and sums over a group scaled, in float32; for few rows, where it is
least work. Weights: each is scaled, and rounded, before it is multiplied; for many rows, and for offsets. At the end: where a
whole row of weights shares a scale.

The sum over the inputs may be split. Programs then leave sums in a workspace, and the last to arrive at a tile adds them up in
the order of the inputs; with USE_SERIAL_SPLITS one program computes the same sums and adds them in that order.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def conversion(kind, half, place, zeros, scaled, offset):
    """PTX of a pair of words in $1 to a pair of weights in $0, of bfloat16 or, with `half`, of float16.

    Further operands, each a pair: with `zeros` what is subtracted, negative; with `scaled` the factor and, with `offset`, what
    is added to the product.
    """
    fma = "fma.rn.f16x2" if half else "fma.rn.bf16x2"
    lines = [".reg .b32 t, u, one, c;", "mov.b32 one, {};".format("0x3c003c00" if half else "0x3f803f80")]
    zero = "c"
    if kind == "float8":
        # exponent and mantissa where those of 16 bits are, their bias corrected by a product
        left, field = (7, "0x3f803f80") if half else (4, "0x07f007f0")
        if place == 0:
            lines += [f"shl.b32 t, $1, {left};", "shl.b32 u, $1, 8;"]
        else:
            lines += [f"shr.b32 t, $1, {8 - left};", "mov.b32 u, $1;"]
        lines += [f"and.b32 t, t, {field};", "lop3.b32 t, u, 0x80008000, t, 0xea;"]
        if not scaled:  # else the factor does it
            lines += ["mov.b32 one, {};".format("0x5c005c00" if half else "0x7b807b80"), "mov.b32 c, 0x80008000;"]
            lines += [f"{fma} t, t, one, c;"]
    else:
        bits = 4 if kind == "int4" else 8
        lines += [f"shr.b32 t, $1, {bits * place};" if place else "mov.b32 t, $1;"]
        if kind == "int4":
            magic, least = ("0x64006400", "0xe408e408") if half else ("0x43004300", "0xc308c308")
            lines += [f"lop3.b32 t, t, 0x000f000f, {magic}, 0xea;", f"mov.b32 c, {least};"]
            zero = "$2" if zeros else "c"
            lines += [f"{fma} t, t, one, {zero};"]
        elif half:
            lines += ["lop3.b32 t, t, 0x00ff00ff, 0x64006400, 0xea;", "mov.b32 c, 0xe480e480;", f"{fma} t, t, one, c;"]
        else:
            # 7 bits are all that the mantissa of 128 has; the eighth makes what is subtracted 128 rather than 256
            lines += ["lop3.b32 u, t, 0x00800080, 0x43804380, 0x6a;", "lop3.b32 t, t, 0x007f007f, 0x43004300, 0xea;"]
            lines += ["mov.b32 one, 0xbf80bf80;", f"{fma} t, u, one, t;"]
    if scaled:
        factor = 3 if zeros else 2
        if offset:
            lines += [f"{fma} t, t, ${factor}, ${factor + 1};"]
        else:
            lines += ["mov.b32 c, 0x80008000;", f"{fma} t, t, ${factor}, c;"]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, t;"]) + "\n}"


@triton.jit
def integers(
    words,  # [BLOCK_OUT, columns] int16
    zeros,  # [BLOCK_OUT, 1] uint8, with USE_ZEROS
    PLACE: tl.constexpr,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    USE_ZEROS: tl.constexpr,
    USE_PTX: tl.constexpr,
):
    """The tile of weights at a place of each word, not scaled: exact in DTYPE."""
    if USE_PTX:
        CODE: tl.constexpr = conversion(KIND, tl.float16 == DTYPE, PLACE, USE_ZEROS, False, False)
        if USE_ZEROS:
            least = negative_zeros(zeros, DTYPE)
            tile = tl.inline_asm_elementwise(CODE, "=r,r,r", [words, least], dtype=DTYPE.value, is_pure=True, pack=2)
        else:
            tile = tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=DTYPE.value, is_pure=True, pack=2)
    elif KIND == "float8":
        bits = words >> (8 * PLACE)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        tile = (half * 256.0).to(DTYPE)
    else:
        BITS: tl.constexpr = 4 if KIND == "int4" else 8
        codes = ((words >> (BITS * PLACE)) & ((1 << BITS) - 1)).to(tl.float32)
        tile = (codes - zeros.to(tl.float32)).to(DTYPE) if USE_ZEROS else (codes - float(1 << (BITS - 1))).to(DTYPE)
    return tile


@triton.jit
def scaled(words, zeros, scales, offsets, PLACE: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr,
           USE_ZEROS: tl.constexpr, USE_OFFSETS: tl.constexpr, USE_PTX: tl.constexpr):  # fmt: skip
    """As `integers`, times `scales` [BLOCK_OUT, 1] float32, and plus `offsets` with USE_OFFSETS; rounded to DTYPE."""
    if USE_PTX:
        CODE: tl.constexpr = conversion(KIND, tl.float16 == DTYPE, PLACE, USE_ZEROS, True, USE_OFFSETS)
        BIAS: tl.constexpr = 1.0 if KIND != "float8" else 256.0 if tl.float16 == DTYPE else 2.0**120
        factor = (scales * BIAS).to(DTYPE)
        if USE_OFFSETS:
            added = offsets.to(DTYPE)
            tile = tl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, factor, added], dtype=DTYPE.value, is_pure=True, pack=2)
        elif USE_ZEROS:
            least = negative_zeros(zeros, DTYPE)
            tile = tl.inline_asm_elementwise(CODE, "=r,r,r,r", [words, least, factor], dtype=DTYPE.value, is_pure=True, pack=2)
        else:
            tile = tl.inline_asm_elementwise(CODE, "=r,r,r", [words, factor], dtype=DTYPE.value, is_pure=True, pack=2)
    else:
        wide = integers(words, zeros, PLACE, KIND, tl.float32, USE_ZEROS, False) * scales
        if USE_OFFSETS:
            wide += offsets
        tile = wide.to(DTYPE)
    return tile


@triton.jit
def negative_zeros(zeros, DTYPE: tl.constexpr):
    """What a code of 4 bits in its power of two lacks to be the code less its zero."""
    return (-(1024.0 if tl.float16 == DTYPE else 128.0) - zeros.to(tl.float32)).to(DTYPE)


@triton.jit
def group_rows(rows_ptr, column, stride, first, SPAN: tl.constexpr, GROUP_SIZE: tl.constexpr, COUNT: tl.constexpr):
    """The values of COUNT groups, SPAN inputs apart, the first of them with input `first`: each [BLOCK_OUT]."""
    if COUNT == 1:
        found = (tl.load(rows_ptr + first // GROUP_SIZE * stride + column),)
    elif COUNT == 2:
        found = (
            tl.load(rows_ptr + first // GROUP_SIZE * stride + column),
            tl.load(rows_ptr + (first + SPAN) // GROUP_SIZE * stride + column),
        )
    else:
        found = (
            tl.load(rows_ptr + first // GROUP_SIZE * stride + column),
            tl.load(rows_ptr + (first + SPAN) // GROUP_SIZE * stride + column),
            tl.load(rows_ptr + (first + 2 * SPAN) // GROUP_SIZE * stride + column),
            tl.load(rows_ptr + (first + 3 * SPAN) // GROUP_SIZE * stride + column),
        )
    return found


@triton.jit
def sum_of_steps(
    x_ptr, words_ptr, scales_ptr, offsets_ptr, x_offset, x_live, word_offset, column, scale_column, out_padded, scale_stride,
    begin, end,
    IN_FEATURES: tl.constexpr, GROUP_SIZE: tl.constexpr, SUB: tl.constexpr, PLACES: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    USE_PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_OUT, BLOCK_ROWS] float32 of the inputs of steps `begin` to `end`; not scaled with SCALE "end"."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = PLACES * SUB  # inputs of a row of words
    PARTS: tl.constexpr = SUB // BLOCK_WORDS
    # inputs that share a scale within a step: at least the SUB of a place
    COMMON: tl.constexpr = STEP if GROUP_SIZE % STEP == 0 else 2 * SUB if GROUP_SIZE % (2 * SUB) == 0 and PLACES > 2 else SUB
    GROUPS: tl.constexpr = STEP // COMMON
    EACH: tl.constexpr = PLACES // GROUPS  # places of a group
    USE_ZEROS: tl.constexpr = OFFSETS == "zeros"
    USE_OFFSETS: tl.constexpr = OFFSETS == "offsets"
    # sums that start anew: with one that goes on from tile to tile, ptxas may wait for each product before the next
    USE_PARTIALS: tl.constexpr = SCALE == "sums" or BLOCK_ROWS <= 64
    inner = tl.arange(0, BLOCK_WORDS)[None, :]
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
    # values of groups are loaded a tile before their use; the arrays are a step longer than the weights
    if SCALE != "end":
        scales = group_rows(scales_ptr, scale_column, scale_stride, begin * STEP, COMMON, GROUP_SIZE, GROUPS)
    if OFFSETS != "none":
        offsets = group_rows(offsets_ptr, column, out_padded, begin * STEP, COMMON, GROUP_SIZE, GROUPS)
    step_words = tl.cast(out_padded, tl.int64) * SUB
    for part in range(begin * PARTS, end * PARTS):
        step, next_step, first_word = part // PARTS, (part + 1) // PARTS, part % PARTS * BLOCK_WORDS
        if SCALE != "end":
            next_scales = group_rows(scales_ptr, scale_column, scale_stride, next_step * STEP, COMMON, GROUP_SIZE, GROUPS)
        if OFFSETS != "none":
            next_offsets = group_rows(offsets_ptr, column, out_padded, next_step * STEP, COMMON, GROUP_SIZE, GROUPS)
        words = tl.load(words_ptr + step * step_words + first_word + word_offset)
        for group in tl.static_range(GROUPS):
            if USE_PARTIALS:
                partial = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
            zeros = offsets[group][:, None] if USE_ZEROS else 0
            for place in tl.static_range(group * EACH, (group + 1) * EACH):
                first = step * STEP + place * SUB + first_word
                if IN_FEATURES % STEP == 0:
                    x_tile = tl.load(x_ptr + first + x_offset, mask=x_live, other=0.0)
                else:
                    x_tile = tl.load(x_ptr + first + x_offset, mask=x_live & (first + inner < IN_FEATURES), other=0.0)
                if SCALE == "weights":
                    factor = scales[group].to(tl.float32)[:, None]
                    added = 0.0
                    if USE_OFFSETS:
                        # codes come without their least one, which is half their number
                        added = offsets[group].to(tl.float32)[:, None] + (8.0 if KIND == "int4" else 128.0) * factor
                    weight = scaled(words, zeros, factor, added, place, KIND, DTYPE, USE_ZEROS, USE_OFFSETS, USE_PTX)
                else:
                    weight = integers(words, zeros, place, KIND, DTYPE, USE_ZEROS, USE_PTX)
                if USE_PARTIALS:
                    partial = tl.dot(weight, x_tile.T, partial, input_precision=PRECISION)
                else:
                    total = tl.dot(weight, x_tile.T, total, input_precision=PRECISION)
            if SCALE == "sums":
                total += partial * scales[group].to(tl.float32)[:, None]
            elif USE_PARTIALS:
                total += partial
        if SCALE != "end":
            scales = next_scales
        if OFFSETS != "none":
            offsets = next_offsets
    return total


@triton.jit(do_not_specialize=["rows", "splits"])
def weight_only_kernel(
    x_ptr,  # [rows, IN_FEATURES], contiguous
    words_ptr,  # [steps, out_padded, SUB] int16
    scales_ptr,  # [groups, scale_stride], or [scale_stride] with SCALE "end"; float16 or float32
    offsets_ptr,  # [groups, out_padded]: uint8 zeros, or float16 or float32 offsets; unused with OFFSETS "none"
    bias_ptr,  # [out_features]; unused without USE_BIAS
    out_ptr,  # [rows, out_features], contiguous
    partial_ptr,  # [tiles, splits, BLOCK_ROWS, BLOCK_OUT] float32; unused where programs do not share tiles
    arrivals_ptr,  # [tiles] int32, zeros before and after; unused likewise
    rows,
    out_features,
    out_padded,
    scale_stride,
    splits,  # of the sum over the inputs
    IN_FEATURES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,  # outputs that share scales
    SUB: tl.constexpr,  # words of a row of a step
    PLACES: tl.constexpr,  # codes of a word
    KIND: tl.constexpr,  # "int4", "int8" or "float8"
    OFFSETS: tl.constexpr,  # "none", "zeros" or "offsets"
    SCALE: tl.constexpr,  # what is scaled: "sums", "weights", or the whole sum at its "end"
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,  # row tiles that share their weights in the cache
    USE_SHARED_SPLITS: tl.constexpr,  # a program each
    USE_SERIAL_SPLITS: tl.constexpr,  # all in one program
    USE_BIAS: tl.constexpr,
    USE_PTX: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
):
    """A tile of outputs and rows, or one split of its sum."""
    STEPS: tl.constexpr = (IN_FEATURES + PLACES * SUB - 1) // (PLACES * SUB)
    tile, split = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    in_group = GROUP_ROWS * out_tiles
    first_tile = tile // in_group * GROUP_ROWS
    group_tiles = tl.minimum(row_tiles - first_tile, GROUP_ROWS)
    place = tile % in_group
    row = (first_tile + place % group_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = place // group_tiles * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    # what is computed beyond the last output is dropped, so it need only be memory of the tensors
    column = out % out_padded
    inner = tl.arange(0, BLOCK_WORDS)[None, :]
    x_offset = row.to(tl.int64)[:, None] * IN_FEATURES + inner
    x_live = (row < rows)[:, None]
    word_offset = column[:, None] * SUB + inner
    scale_column = column // SCALE_ROWS

    if USE_SERIAL_SPLITS:
        total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)
        for each in range(splits):
            begin, end = split + each * STEPS // splits, (each + 1) * STEPS // splits
            total += sum_of_steps(
                x_ptr, words_ptr, scales_ptr, offsets_ptr, x_offset, x_live, word_offset, column, scale_column,
                out_padded, scale_stride, begin, end, IN_FEATURES, GROUP_SIZE, SUB, PLACES, KIND, OFFSETS, SCALE,
                BLOCK_ROWS, BLOCK_OUT, BLOCK_WORDS, USE_PTX, PRECISION,
            )  # fmt: skip
    else:
        begin, end = 0, STEPS
        if USE_SHARED_SPLITS:
            begin, end = split * STEPS // splits, (split + 1) * STEPS // splits
            tl.assume(begin < end)  # with which, too, ptxas does not wait for each product
        total = sum_of_steps(
            x_ptr, words_ptr, scales_ptr, offsets_ptr, x_offset, x_live, word_offset, column, scale_column,
            out_padded, scale_stride, begin, end, IN_FEATURES, GROUP_SIZE, SUB, PLACES, KIND, OFFSETS, SCALE,
            BLOCK_ROWS, BLOCK_OUT, BLOCK_WORDS, USE_PTX, PRECISION,
        )  # fmt: skip

    sums = total.T
    live = (row < rows)[:, None] & (out < out_features)[None, :]
    if USE_SHARED_SPLITS:
        index = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
        slots_ptr = partial_ptr + tile.to(tl.int64) * splits * (BLOCK_ROWS * BLOCK_OUT)
        tl.store(slots_ptr + split * (BLOCK_ROWS * BLOCK_OUT) + index, sums, mask=live)
        tl.debug_barrier()  # all of the program's sums are written before it arrives
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") != splits - 1:
            return
        sums = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
        for each in range(splits):
            # past the first cache, which other multiprocessors do not write to
            sums += tl.load(slots_ptr + each * (BLOCK_ROWS * BLOCK_OUT) + index, mask=live, other=0.0, cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)
    if SCALE == "end":
        sums *= tl.load(scales_ptr + scale_column).to(tl.float32)[None, :]
    if USE_BIAS:
        sums += tl.load(bias_ptr + out, mask=out < out_features, other=0.0).to(tl.float32)[None, :]
    places = out_ptr + row.to(tl.int64)[:, None] * out_features + out[None, :]
    tl.store(places, sums.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def unpack_kernel(
    words_ptr,  # [steps, out_padded, SUB] int16
    scales_ptr,  # as in `weight_only_kernel`
    offsets_ptr,
    out_ptr,  # [outputs, IN_FEATURES]: those from first_out on
    first_out,
    last_out,
    out_padded,
    scale_stride,
    IN_FEATURES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SUB: tl.constexpr,
    PLACES: tl.constexpr,
    KIND: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Weights of a step and of BLOCK_OUT outputs: computed in float32, rounded once."""
    USE_ZEROS: tl.constexpr = OFFSETS == "zeros"
    step = tl.program_id(0)
    out = first_out + tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column, live = out % out_padded, out < last_out
    inner = tl.arange(0, SUB)[None, :]
    words = tl.load(words_ptr + step.to(tl.int64) * (out_padded * SUB) + column[:, None] * SUB + inner)
    for place in tl.static_range(PLACES):
        first = step * (PLACES * SUB) + place * SUB
        group = first // GROUP_SIZE
        zeros = 0
        if USE_ZEROS:
            zeros = tl.load(offsets_ptr + group * out_padded + column)[:, None]
        values = integers(words, zeros, place, KIND, tl.float32, USE_ZEROS, False)
        scales = tl.load(scales_ptr + group * scale_stride + column // SCALE_ROWS).to(tl.float32)[:, None]
        values *= scales
        if OFFSETS == "offsets":
            values += tl.load(offsets_ptr + group * out_padded + column).to(tl.float32)[:, None]
            values += scales * (8.0 if KIND == "int4" else 128.0)
        target = out_ptr + (out - first_out).to(tl.int64)[:, None] * IN_FEATURES + first + inner
        tl.store(target, values.to(out_ptr.dtype.element_ty), mask=live[:, None] & (first + inner < IN_FEATURES))
