"""One tile of outputs times some rows, in instructions that Numba's own loops do not become: bfloat16 pairs, AVX512-BF16.

A tile is 16 outputs. For each group of inputs it has 16 scales and 16 offsets in bfloat16 (what the middle code stands for),
then vectors of 16 words of 32 bits, a word an output, with the codes of 8 inputs of 4 bits or of 4 inputs of 8. A code's four
bits below the exponent of 128 are the bfloat16 number 128 + code, so a shift, a mask and one instruction multiply two inputs of
each output; what that is too much is 128 times the sum of the inputs. Eight bits are two codes of four, of the same inputs.

Weights in bfloat16 come in blocks of 64 outputs, that is four vectors of two inputs each, as oneDNN keeps them as well.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

TILE = 16  # outputs
BLOCK = 4 * TILE  # outputs of weights in bfloat16
BLOCK_ROWS = 6  # that a product of a block keeps in registers, at most
_FLOATS = ir.VectorType(ir.FloatType(), TILE)
_WORDS = ir.VectorType(ir.IntType(32), TILE)
_PAIRS = ir.VectorType(ir.IntType(16), 2 * TILE)
_WORDS_OF_PAIRS = ir.VectorType(ir.IntType(32), 2 * TILE)
_HALVES = ir.VectorType(ir.IntType(16), TILE)
_DOT = ir.InlineAsm(ir.FunctionType(_FLOATS, [_FLOATS, _WORDS, _WORDS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")
# of two vectors, the second's numbers before the first's
_NARROW = ir.InlineAsm(ir.FunctionType(_PAIRS, [_FLOATS, _FLOATS]), "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v")


def available() -> bool:
    """Whether Numba compiles for a processor with the instructions."""
    return "+avx512bf16" in cpu_target.target_context.codegen()._tm_features


binding.initialize_native_asmparser()


@intrinsic(prefer_literal=True)
def multiply_tile(context, codes, x, stride, sums, groups, vectors, out, rows, planes):
    """Write [rows, 16] float32 to `out`.

    Args:
        codes: the tile.
        x: [rows, inputs] bfloat16.
        stride: bytes from one row of `x` to the next.
        sums: [rows, groups] float32, of the inputs of each group.
        groups: of inputs.
        vectors: of codes in a group.
        rows: a literal.
        planes: 1 for codes of four bits, 2 for eight; a literal.
    """
    count, halves = rows.literal_value, planes.literal_value
    chains = max(4 // count, halves)  # sums that an instruction need not wait for one another in

    def generate(context, builder, signature, arguments):
        codes, x, stride, sums, groups, vectors, out = arguments[:7]
        integer = codes.type

        def load(address, kind):
            return builder.load(builder.inttoptr(address, kind.as_pointer()))

        def all_of(value, kind):
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_WORDS, [0] * TILE))

        def words(value):
            return ir.Constant(_WORDS, [value] * TILE)

        def floats(value):
            return ir.Constant(_FLOATS, [value] * TILE)

        def widened(address):
            wide = builder.zext(load(address, _HALVES), _WORDS)
            return builder.bitcast(builder.shl(wide, words(16)), _FLOATS)

        def multiply_add(a, b, c):
            return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

        def offset(*factors):
            product = factors[0]
            for factor in factors[1:]:
                product = builder.mul(product, factor if isinstance(factor, ir.Value) else integer(factor))
            return product

        totals = [cgutils.alloca_once(builder, _FLOATS) for _ in range(count)]
        parts = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(chains)] for _ in range(count)]
        for total in totals:
            builder.store(floats(0.0), total)
        starts = [builder.add(x, offset(stride, row)) for row in range(count)]
        size = offset(builder.add(vectors, integer(1)), 4 * TILE)
        with cgutils.for_range(builder, groups) as group:
            head = builder.add(codes, offset(size, group.index))
            inputs = []
            for row in range(count):
                place = builder.add(offset(groups, row), group.index)
                inputs.append(all_of(load(builder.add(sums, offset(place, 4)), ir.FloatType()), _FLOATS))
                too_much = [-136.0 if halves == 1 else -128.0, 0.0 if halves == 1 else -136.0, 0.0, 0.0]
                for chain, factor in zip(parts[row], too_much, strict=False):
                    builder.store(builder.fmul(inputs[row], floats(factor)) if factor else floats(0.0), chain)
            first = offset(vectors, group.index)
            with cgutils.for_range(builder, vectors) as vector:
                word = load(builder.add(head, offset(builder.add(vector.index, integer(1)), 4 * TILE)), _WORDS)
                pair = offset(builder.add(first, vector.index), 16 // halves)
                for nibble in range(4):
                    bits = builder.lshr(word, words(4 * nibble)) if nibble else word
                    bits = builder.or_(builder.and_(bits, words(0x000F000F)), words(0x43004300))
                    place = builder.add(pair, integer(4 * (nibble // halves)))
                    for row in range(count):
                        twins = all_of(load(builder.add(starts[row], place), ir.IntType(32)), _WORDS)
                        chain = parts[row][nibble % chains]
                        builder.store(builder.call(_DOT, [builder.load(chain), bits, twins]), chain)
            scales, offsets = widened(head), widened(builder.add(head, integer(2 * TILE)))
            for row in range(count):
                found = [builder.load(chain) for chain in parts[row]]
                sides = []
                for side in range(halves):
                    of_side = found[side::halves]
                    for each in of_side[1:]:
                        of_side[0] = builder.fadd(of_side[0], each)
                    sides.append(of_side[0])
                product = sides[0] if halves == 1 else multiply_add(sides[1], floats(16.0), sides[0])
                total = multiply_add(offsets, inputs[row], builder.load(totals[row]))
                builder.store(multiply_add(scales, product, total), totals[row])
        for row, total in enumerate(totals):
            place = builder.inttoptr(builder.add(out, integer(4 * TILE * row)), _FLOATS.as_pointer())
            builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, rows, planes), generate


@intrinsic(prefer_literal=True)
def multiply_block(context, weights, x, stride, pairs, out, rows):
    """Add the products of a block of weights in bfloat16 to [rows, 64] float32 at `out`; sums go by inputs, two at a time.

    Args:
        weights: [pairs, 64, 2] bfloat16: two inputs' of each output side by side.
        x: [rows, 2 * pairs] bfloat16.
        stride: bytes from one row of `x` to the next.
        rows: a literal of at most `BLOCK_ROWS`.
    """
    count, vectors = rows.literal_value, BLOCK // TILE

    def generate(context, builder, signature, arguments):
        weights, x, stride, pairs, out = arguments[:5]
        integer = weights.type

        def pointer(address, kind):
            return builder.inttoptr(address, kind.as_pointer())

        def all_of(value):
            first = builder.insert_element(ir.Constant(_WORDS, ir.Undefined), value, ir.IntType(32)(0))
            return builder.shuffle_vector(first, ir.Constant(_WORDS, ir.Undefined), ir.Constant(_WORDS, [0] * TILE))

        places = [[integer(4 * TILE * (vectors * row + i)) for i in range(vectors)] for row in range(count)]
        places = [[pointer(builder.add(out, place), _FLOATS) for place in of_row] for of_row in places]
        sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(vectors)] for _ in range(count)]
        for of_row, sums_of_row in zip(places, sums, strict=True):
            for place, total in zip(of_row, sums_of_row, strict=True):
                builder.store(builder.load(place, align=4), total)
        starts = [builder.add(x, builder.mul(stride, integer(row))) for row in range(count)]
        with cgutils.for_range(builder, pairs) as pair:
            begin = builder.add(weights, builder.mul(pair.index, integer(4 * BLOCK)))
            found = [builder.add(begin, integer(4 * TILE * i)) for i in range(vectors)]
            found = [builder.load(pointer(each, _WORDS), align=4) for each in found]
            for start, sums_of_row in zip(starts, sums, strict=True):
                at = builder.add(start, builder.mul(pair.index, integer(4)))
                twins = all_of(builder.load(pointer(at, ir.IntType(32)), align=2))
                for each, total in zip(found, sums_of_row, strict=True):
                    builder.store(builder.call(_DOT, [builder.load(total), each, twins]), total)
        for of_row, sums_of_row in zip(places, sums, strict=True):
            for place, total in zip(of_row, sums_of_row, strict=True):
                builder.store(builder.load(total), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, rows), generate


@intrinsic(prefer_literal=True)
def unpack_vectors(context, header, codes, vectors, out, planes):
    """The values of some vectors of codes, which bfloat16 rounds, at a quarter of each [64, 2] from `out` on.

    Args:
        header: the scales and offsets of the vectors' group.
        planes: as of `multiply_tile`; a literal.
    """
    halves = planes.literal_value
    each, bits, middle = 4 // halves, 4 * halves, 8.0 if halves == 1 else 128.0

    def generate(context, builder, signature, arguments):
        header, codes, vectors, out = arguments[:4]
        integer = codes.type

        def load(address, kind):
            return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

        def words(value):
            return ir.Constant(_WORDS, [value] * TILE)

        def widened(address):
            return builder.bitcast(builder.shl(builder.zext(load(address, _HALVES), _WORDS), words(16)), _FLOATS)

        def multiply_add(a, b, c):
            return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

        scales = widened(header)
        zeros = multiply_add(scales, ir.Constant(_FLOATS, [-middle] * TILE), widened(builder.add(header, integer(2 * TILE))))
        order = ir.Constant(_WORDS_OF_PAIRS, [side * TILE + i for i in range(TILE) for side in range(2)])
        with cgutils.for_range(builder, vectors) as vector:
            word = load(builder.add(codes, builder.mul(vector.index, integer(4 * TILE))), _WORDS)
            to = builder.add(out, builder.mul(vector.index, integer(each * 4 * BLOCK)))
            for part in range(each):
                sides = []
                for shift in (bits * part, bits * part + 16):
                    code = builder.and_(builder.lshr(word, words(shift)), words((1 << bits) - 1))
                    sides.append(multiply_add(builder.sitofp(code, _FLOATS), scales, zeros))
                pairs = builder.call(_NARROW, [sides[1], sides[0]])
                pairs = builder.shuffle_vector(pairs, ir.Constant(_PAIRS, ir.Undefined), order)
                place = builder.inttoptr(builder.add(to, integer(part * 4 * BLOCK)), _PAIRS.as_pointer())
                builder.store(pairs, place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, planes), generate
