"""Codes and inputs in shared memory as the operands of linear_few.

Lane t of four has the word t of each chunk, and of each unit the four inputs that its codes meet: words need not change
lanes. Warps that lie side by side along a row (SPLIT) have a part of each step.
"""

from __future__ import annotations

from qcompile.kernels._gluon import codes, gl, gluon
from qcompile.kernels._operand import bases, floats, own_words, unstack
from qcompile.kernels._tiles import constexpr_function, stack


@constexpr_function
def _of_words(split, tall, words):
    """(rows, words of a step)."""
    registers = [*bases(words, 4, 2, 1), [8, 0]]
    lanes = [[0, 1], [0, 2], *bases(8, 1, 2, 0)]
    warps = bases(16 * tall, 16, 2, 0) + bases(split * words, words, 2, 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * tall, split * words])


@constexpr_function
def _of_chunks(split, tall, chunks):
    """(splits * rows, chunks, words of a chunk)."""
    registers = [[8, 0, 0], *bases(chunks, 1, 3, 1)]
    lanes = [[0, 0, 1], [0, 0, 2], *bases(8, 1, 3, 0)]
    warps = bases(16 * tall * split, 16, 3, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * tall * split, chunks, 4])


@gluon.jit
def read_codes(planes, slot, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr, SPLIT: gl.constexpr):
    """Of each plane, for each piece and chunk of its units, words (splits * rows, chunks, 4)."""
    words = _words_of(planes[0], slot, CODES, PIECE, W.fields, W.p0, SPLIT)
    if W.p1 > 0:
        words += _words_of(planes[1], slot, CODES, PIECE, W.fields, W.p1, SPLIT)
    if W.p2 > 0:
        words += _words_of(planes[2], slot, CODES, PIECE, W.fields, W.p2, SPLIT)
    return words


@gluon.jit
def _words_of(
    plane, slot, CODES: gl.constexpr, PIECE: gl.constexpr, FIELDS: gl.constexpr, WIDTH: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    TALL: gl.constexpr = gl.num_warps() // SPLIT
    CHUNKS: gl.constexpr = PIECE // (16 * FIELDS)
    COUNT: gl.constexpr = CODES * WIDTH // 128 // CHUNKS
    words = plane.index(slot).load(_of_words(SPLIT, TALL, CODES * WIDTH // 32))
    words = gl.permute(gl.reshape(words, [16 * TALL, SPLIT, COUNT, CHUNKS, 4]), (1, 0, 3, 4, 2))
    words = unstack(gl.reshape(words, [SPLIT * 16 * TALL, CHUNKS, 4, COUNT]), COUNT)
    found = ()
    for i in gl.static_range(COUNT):
        found += (gl.convert_layout(words[i], _of_chunks(SPLIT, TALL, CHUNKS), assert_trivial=True),)
    return found


@gluon.jit
def as_floats(
    words, INDEX: gl.constexpr, CODES: gl.constexpr, PIECE: gl.constexpr, PART: gl.constexpr, W: gl.constexpr,
    DTYPE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A piece's codes as floats, in parts (splits, rows, PART)."""
    FIELDS: gl.constexpr = W.fields
    TALL: gl.constexpr = gl.num_warps() // SPLIT
    own = own_words(words, 0, INDEX, W.fields, W.p0)
    if W.p1 > 0:
        own += own_words(words, CODES // PIECE * (FIELDS * W.p0 // 8), INDEX, W.fields, W.p1)
    if W.p2 > 0:
        own += own_words(words, CODES // PIECE * (FIELDS * (W.p0 + W.p1) // 8), INDEX, W.fields, W.p2)
    pairs = ()
    for field in gl.static_range(FIELDS):
        found = codes(own, field, W)
        found = gl.join(found, found)
        pairs += (floats(found, "0x4140", W.bits, DTYPE), floats(found, "0x4342", W.bits, DTYPE))
    w = gl.reshape(stack(pairs, 2 * FIELDS), [SPLIT, 16 * TALL, PIECE // (16 * FIELDS), 4, 2, FIELDS, 2])
    w = gl.reshape(gl.permute(w, (0, 1, 2, 5, 6, 3, 4)), [SPLIT, 16 * TALL, PIECE // PART, PART])
    return unstack(gl.permute(w, (0, 1, 3, 2)), PIECE // PART)


@constexpr_function
def _of_inputs(split, tall, tokens, part):
    """(splits, tokens, inputs of a part)."""
    registers = [[0, 0, 1], [0, 0, 2], *bases(part, 16, 3, 2), *bases(tokens, 8, 3, 1)]
    lanes = [[0, 0, 4], [0, 0, 8], *bases(8, 1, 3, 1)]
    warps = [[0, 0, 0]] * (tall.bit_length() - 1) + bases(split, 1, 3, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [split, tokens, part])


@gluon.jit
def read_inputs(xs, AT: gl.constexpr, PART: gl.constexpr, MMA: gl.constexpr):
    """The second operand (splits, PART, tokens), in the order of the first's codes."""
    SPLIT: gl.constexpr = xs.shape[0]
    TOKENS: gl.constexpr = xs.shape[1]
    x = xs.slice(AT, PART, 2).load(_of_inputs(SPLIT, gl.num_warps() // SPLIT, TOKENS, PART))
    x = gl.permute(gl.reshape(x, [SPLIT, TOKENS, PART // 16, 4, 2, 2]), (0, 2, 4, 3, 5, 1))
    return gl.convert_layout(gl.reshape(x, [SPLIT, PART, TOKENS]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def few_starts(x_ptr, first_m, M, K, TOKENS: gl.constexpr, CODES: gl.constexpr, SPLIT: gl.constexpr):
    """As _inputs.input_starts, of one block, whose inputs of a step are (splits, tokens, CODES)."""
    NEXT: gl.constexpr = min(32, CODES // 8)
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // NEXT, NEXT], [SPLIT, gl.num_warps() // SPLIT, 1], [2, 1, 0])
    split = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    k = split * CODES + gl.arange(0, CODES, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return ((x_ptr + first_m.to(gl.int64) * K, m * K + k, k, m < M - first_m),)
