"""Codes in shared memory as the first operand of products on tensor cores.

Lane 4g + t of a warp has rows g and g + 8 of its sixteen, and of each unit the codes 2t, 2t + 1, 2t + 8 and 2t + 9,
which are bytes of two of its words. A code becomes a float beside a power of two (2**7 + code in bfloat16 has the code
in its low bits), which is taken off together with the zero point; then it is scaled, and rounded once. A *piece* is
what is multiplied at once: whole chunks of the smallest plane.
"""

from __future__ import annotations

from qcompile.kernels._gluon import codes, gl, gluon, pick_bytes
from qcompile.kernels._tiles import constexpr_function, stack


@constexpr_function
def bases(count, unit, rank, dim):
    """Bases of a dimension of `count` places from `unit` on."""
    return [[unit << i if d == dim else 0 for d in range(rank)] for i in range((count // unit).bit_length() - 1)]


@constexpr_function
def rows_layout(columns, warps):
    """(rows, columns) for lanes that have all columns of their two rows."""
    registers = bases(columns, 1, 2, 1) + [[8, 0]]
    lanes = [[0, 0], [0, 0], *bases(8, 1, 2, 0)]
    return gl.DistributedLinearLayout(registers, lanes, bases(16 * warps, 16, 2, 0), [], [16 * warps, columns])


@constexpr_function
def _of_words(words, warps):
    """(rows, words) as lanes read them: lane t words t / 2 and t / 2 + 2 of every chunk."""
    registers = [*bases(words, 2, 2, 1), [8, 0]]
    lanes = [[0, 0], [0, 1], *bases(8, 1, 2, 0)]
    return gl.DistributedLinearLayout(registers, lanes, bases(16 * warps, 16, 2, 0), [], [16 * warps, words])


@constexpr_function
def _of_pairs(chunks, warps):
    """(rows, chunks, t / 2, t % 2, codes of a pair)."""
    registers = [[0, 0, 0, 0, 1], [8, 0, 0, 0, 0], *bases(chunks, 1, 5, 1)]
    lanes = [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0], *bases(8, 1, 5, 0)]
    return gl.DistributedLinearLayout(registers, lanes, bases(16 * warps, 16, 5, 0), [], [16 * warps, chunks, 2, 2, 2])


@constexpr_function
def _of_piece(groups, units, warps):
    """(rows, groups, units of a group, halves, t / 2, t % 2, codes of a pair): the first operand, taken apart."""
    registers = [[0, 0, 0, 0, 0, 0, 1], [8, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    registers += bases(units, 1, 7, 2) + bases(groups, 1, 7, 1)
    lanes = [[0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0, 0], *bases(8, 1, 7, 0)]
    shape = [16 * warps, groups, units, 2, 2, 2, 2]
    return gl.DistributedLinearLayout(registers, lanes, bases(16 * warps, 16, 7, 0), [], shape)


@gluon.jit
def unstack(tensor, COUNT: gl.constexpr):
    """The COUNT tensors (A, B, C) of a tensor (A, B, C, COUNT); a power of two."""
    if COUNT == 1:
        return (gl.reshape(tensor, [tensor.shape[0], tensor.shape[1], tensor.shape[2]]),)
    else:
        halves = gl.reshape(tensor, [tensor.shape[0], tensor.shape[1], tensor.shape[2], 2, COUNT // 2])
        first, second = gl.split(gl.permute(halves, (0, 1, 2, 4, 3)))
        return unstack(first, COUNT // 2) + unstack(second, COUNT // 2)


@gluon.jit
def read_words(planes, slot, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr, WARPS: gl.constexpr):
    """Of each plane, for each piece and chunk of its units, a lane's bytes (rows, chunks, t / 2, t % 2)."""
    words = _words_of(planes[0], slot, CODES, PIECE, W.fields, W.p0, WARPS)
    if W.p1 > 0:
        words += _words_of(planes[1], slot, CODES, PIECE, W.fields, W.p1, WARPS)
    if W.p2 > 0:
        words += _words_of(planes[2], slot, CODES, PIECE, W.fields, W.p2, WARPS)
    return words


@gluon.jit
def _words_of(
    plane, slot, CODES: gl.constexpr, PIECE: gl.constexpr, FIELDS: gl.constexpr, WIDTH: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    CHUNKS: gl.constexpr = PIECE // (16 * FIELDS)
    COUNT: gl.constexpr = CODES * WIDTH // 128 // CHUNKS
    L: gl.constexpr = gl.SliceLayout(4, _of_pairs(CHUNKS, WARPS))
    HALF: gl.constexpr = gl.SliceLayout(3, L)
    words = plane.index(slot).load(_of_words(CODES * WIDTH // 32, WARPS))
    words = gl.permute(gl.reshape(words, [16 * WARPS, COUNT, CHUNKS, 2, 2]), (0, 2, 4, 1, 3))
    low, high = gl.split(words)
    low, high = unstack(low, COUNT), unstack(high, COUNT)
    odd = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
    selector = (odd * 0x2222 + 0x5410)[None, None, None, :]
    found = ()
    for i in gl.static_range(COUNT):
        a = gl.expand_dims(gl.convert_layout(low[i], HALF, assert_trivial=True), 3)
        b = gl.expand_dims(gl.convert_layout(high[i], HALF, assert_trivial=True), 3)
        found += (pick_bytes(a, b, selector),)
    return found


@gluon.jit
def read_sides(scale, zero, step, K, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    """Scales and zero points of a step: for each piece, or several at once, (rows, groups)."""
    scales = _sides_of(scale, step, K, CODES, PIECE, W, EVEN)
    return scales, () if zero is None else _sides_of(zero, step, K, CODES, PIECE, W, EVEN)


@gluon.jit
def _sides_of(row, step, K, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    WARPS: gl.constexpr = gl.num_warps()
    SHARE: gl.constexpr = min(W.run, CODES)
    GROUPS: gl.constexpr = CODES // SHARE
    L: gl.constexpr = rows_layout(GROUPS, WARPS)
    i = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, L))
    if W.group == 0:
        at = i
    elif EVEN and W.group == SHARE:  # neighbours, which the compiler sees
        at = gl.minimum(step, K // CODES - 1) * GROUPS + i
    else:
        at = gl.minimum(step * CODES + i * SHARE, K - 1) // W.group
    start, offset = row
    offset = gl.convert_layout(offset, gl.SliceLayout(1, L), assert_trivial=True)
    return by_piece(gl.load(start + (offset[:, None] + at[None, :])), PIECE, SHARE)


@gluon.jit
def by_piece(sides, PIECE: gl.constexpr, SHARE: gl.constexpr):
    """Sides (rows, groups) for each piece, or several at once; SHARE codes have the same."""
    PARTS: gl.constexpr = max(1, PIECE // SHARE)
    COUNT: gl.constexpr = max(1, sides.shape[1] // PARTS)
    return unstack(gl.permute(gl.reshape(sides, [sides.shape[0], 1, COUNT, PARTS]), (0, 1, 3, 2)), COUNT)


@gluon.jit
def piece_weights(
    words, sides, INDEX: gl.constexpr, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr, DTYPE: gl.constexpr
):
    """A piece of the first operand (rows, PIECE)."""
    WARPS: gl.constexpr = gl.num_warps()
    FIELDS: gl.constexpr = W.fields
    CHUNKS: gl.constexpr = PIECE // (16 * FIELDS)
    PARTS: gl.constexpr = max(1, PIECE // min(W.run, CODES))
    PAIRS: gl.constexpr = _of_pairs(CHUNKS, WARPS)
    L: gl.constexpr = _of_piece(PARTS, PIECE // 16 // PARTS, WARPS)
    own = own_words(words, 0, INDEX, W.fields, W.p0)
    if W.p1 > 0:
        own += own_words(words, CODES // PIECE * (FIELDS * W.p0 // 8), INDEX, W.fields, W.p1)
    if W.p2 > 0:
        own += own_words(words, CODES // PIECE * (FIELDS * (W.p0 + W.p1) // 8), INDEX, W.fields, W.p2)
    pairs = ()
    for field in gl.static_range(FIELDS):
        found = gl.expand_dims(codes(own, field, W), 4)
        found, _ = gl.broadcast(found, gl.full([16 * WARPS, CHUNKS, 2, 2, 2], 0, gl.int32, layout=PAIRS))
        pairs += (floats(found, "0x4140", W.bits, DTYPE), floats(found, "0x4342", W.bits, DTYPE))
    w = gl.reshape(stack(pairs, 2 * FIELDS), [16 * WARPS, CHUNKS, 2, 2, 2, FIELDS, 2])
    w = gl.permute(w, (0, 1, 5, 6, 2, 3, 4))
    w = gl.convert_layout(gl.reshape(w, [16 * WARPS, PARTS, PIECE // 16 // PARTS, 2, 2, 2, 2]), L)
    scales, zeros = sides
    BESIDE: gl.constexpr = beside(DTYPE, W.bits)
    scale, rest = None, None
    if W.group != 0:
        scale = _spread(scales[INDEX * len(scales) // (CODES // PIECE)].to(DTYPE), L)
    if len(zeros) == 0 or W.added:
        w = _fused("$1, one, constant", w, w, w, DTYPE, -BESIDE if W.added else -BESIDE - W.offset)
        if W.added:
            rest = _spread(zeros[INDEX * len(zeros) // (CODES // PIECE)].to(DTYPE), L)
    else:
        # In two parts: with what the first leaves, at most a rounding of it, the weight is rounded once.
        given = zeros[INDEX * len(zeros) // (CODES // PIECE)]
        zero = _spread(given.to(DTYPE), L)
        near = _fused("$1, one, constant", zero, zero, zero, DTYPE, BESIDE)
        w = _fused("$2, minus, $1", w, near, w, DTYPE, 0)
        if given.dtype != gl.uint8:
            rest = _fused("$1, one, constant", near, near, near, DTYPE, -BESIDE)
            rest = _fused("$2, minus, $1", rest, zero, zero, DTYPE, 0)
            if given.dtype != DTYPE:
                finer = _spread((given.to(gl.float32) - given.to(DTYPE).to(gl.float32)).to(DTYPE), L)
                rest = _fused("$2, minus, $1", rest, finer, finer, DTYPE, 0)
            if W.group != 0:
                rest = _fused("$1, $2, constant", rest, scale, scale, DTYPE, 0)
    if W.group == 0:
        if rest is not None:
            w = _fused("$1, one, $2", w, rest, w, DTYPE, 0)
    elif rest is None:
        w = _fused("$1, $2, constant", w, scale, w, DTYPE, 0)
    else:
        w = _fused("$1, $2, $3", w, scale, rest, DTYPE, 0)
    return w


@gluon.jit
def own_words(words, FIRST: gl.constexpr, INDEX: gl.constexpr, FIELDS: gl.constexpr, WIDTH: gl.constexpr):
    """A plane's words of a piece."""
    COUNT: gl.constexpr = FIELDS * WIDTH // 8
    own = ()
    for i in gl.static_range(COUNT):
        own += (words[FIRST + INDEX * COUNT + i],)
    return own


@gluon.jit
def _spread(side, L: gl.constexpr):
    """(rows, groups) beside the pairs of a piece."""
    UNITS: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, gl.SliceLayout(5, gl.SliceLayout(6, L))))
    side = gl.reshape(side, [side.shape[0], side.shape[2]])
    side = gl.convert_layout(side, gl.SliceLayout(2, UNITS), assert_trivial=True)
    for dim in gl.static_range(2, 7):
        side = gl.expand_dims(side, dim)
    pair = gl.full([side.shape[0], side.shape[1], 1, 1, 1, 1, 2], 0.0, side.dtype, layout=L)
    side, _ = gl.broadcast(side, pair)
    return side


@constexpr_function
def beside(dtype, bits):
    """What `floats` leaves beside a code."""
    return 1024 if dtype.is_fp16() else 128 if bits < 8 else -128


@gluon.jit
def floats(found, SELECTOR: gl.constexpr, BITS: gl.constexpr, DTYPE: gl.constexpr):
    """Two of the four codes of a word, beside a power of two; `found` has every word twice."""
    return gl.inline_asm_elementwise(_float_asm(SELECTOR, BITS, DTYPE), "=r,r,r", [found], DTYPE.value, True, 2)


@constexpr_function
def _float_asm(selector, bits, dtype):
    if dtype.is_fp16():
        return f"prmt.b32 $0, $1, 0x64646464, {selector};"
    if bits < 8:
        return f"prmt.b32 $0, $1, 0x43434343, {selector};"
    # 128 + the low seven bits, - 384, + 128 or, with the eighth, 256.
    return (
        f"{{ .reg .b32 low, top, one, minus; prmt.b32 low, $1, 0, {selector}; "
        "lop3.b32 top, low, 0x00800080, 0x43004300, 0xEA; lop3.b32 low, low, 0x007F007F, 0x43004300, 0xEA; "
        "mov.b32 one, 0x3F803F80; mov.b32 minus, 0xC3C0C3C0; "
        "fma.rn.bf16x2 low, low, one, minus; fma.rn.bf16x2 $0, low, one, top; }"
    )


@gluon.jit
def _fused(FORM: gl.constexpr, a, b, c, DTYPE: gl.constexpr, CONSTANT: gl.constexpr):
    """a * b + c, in pairs, of the operands that FORM names."""
    return gl.inline_asm_elementwise(_fused_asm(FORM, DTYPE, CONSTANT), "=r,r,r,r", [a, b, c], DTYPE.value, True, 2)


@constexpr_function
def _fused_asm(form, dtype, constant):
    kind, bias, width = ("f16", 15, 10) if dtype.is_fp16() else ("bf16", 127, 7)
    one, bits = bias << width, 0
    if constant != 0:
        exponent = abs(constant).bit_length() - 1
        bits = ((bias + exponent) << width) | (((abs(constant) << width) >> exponent) & ((1 << width) - 1))
    sign = 0 if constant > 0 else 0x8000  # what is added to nothing is -0
    return (
        f"{{ .reg .b32 one, minus, constant; mov.b32 one, {one * 0x10001}; mov.b32 minus, {(one | 0x8000) * 0x10001}; "
        f"mov.b32 constant, {(bits | sign) * 0x10001}; fma.rn.{kind}x2 $0, {form}; }}"
    )
