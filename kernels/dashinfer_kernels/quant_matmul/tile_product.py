"""One tile of outputs times some rows, in instructions that Numba's own loops do not become: bfloat16 pairs, AVX512-BF16.

A tile is 16 outputs. For each group of inputs it has 16 scales and 16 offsets in bfloat16 (what the middle code stands for),
then vectors of 16 words of 32 bits, a word an output, with the codes of 8 inputs of 4 bits or of 4 inputs of 8. A code's four
bits below the exponent of 128 are the bfloat16 number 128 + code, so a shift, a mask and one instruction multiply two inputs of
each output; what that is too much is 128 times the sum of the inputs. Eight bits are two codes of four, of the same inputs.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

TILE = 16  # outputs
_FLOATS = ir.VectorType(ir.FloatType(), TILE)
_WORDS = ir.VectorType(ir.IntType(32), TILE)
_HALVES = ir.VectorType(ir.IntType(16), TILE)
_DOT = ir.InlineAsm(ir.FunctionType(_FLOATS, [_FLOATS, _WORDS, _WORDS]), "vdpbf16ps $3, $2, $0", "=v,0,v,v")


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
