"""Keys and values as operands of mma, for attention of up to eight query rows; as warps read them from shared memory.

Lane 4g + t reads columns 8t … 8t + 7, and every 32nd further on, of keys g, g + 8 …: products with queries may take
columns in any order. Of values it reads columns 8g … 8g + 7, and 64 further on, of keys 2t, 2t + 1, 2t + 8 …, whose
weights are what those products have given it. So nothing changes lanes. Tensors have a first axis of warps, each of
which has keys and sums of its own.
"""

from __future__ import annotations

from qcompile.kernels._attention import masked
from qcompile.kernels._gluon import ampere, barrier, gl, gluon
from qcompile.kernels._operand import bases
from qcompile.kernels._tiles import constexpr_function


@constexpr_function
def of_queries(warps, columns):
    """(warps, eight rows, columns), the same for all warps"""
    registers = [*bases(8, 1, 3, 2), *bases(columns, 32, 3, 2)]
    lanes = [*bases(32, 8, 3, 2), *bases(8, 1, 3, 1)]
    return gl.DistributedLinearLayout(registers, lanes, bases(warps, 1, 3, 0), [], [warps, 8, columns])


@constexpr_function
def of_keys(warps, keys, columns):
    """(warps, keys of a warp, pairs of columns)"""
    registers = [*bases(4, 1, 3, 2), *bases(columns // 2, 16, 3, 2), *bases(keys, 8, 3, 1)]
    lanes = [*bases(16, 4, 3, 2), *bases(8, 1, 3, 1)]
    return gl.DistributedLinearLayout(registers, lanes, bases(warps, 1, 3, 0), [], [warps, keys, columns // 2])


@constexpr_function
def of_values(warps, keys, columns):
    """(warps, keys of a warp, pairs of columns)"""
    registers = [*bases(4, 1, 3, 2), *bases(columns // 2, 32, 3, 2), [0, 1, 0], *bases(keys, 8, 3, 1)]
    lanes = [*bases(8, 2, 3, 1), *bases(32, 4, 3, 2)]
    return gl.DistributedLinearLayout(registers, lanes, bases(warps, 1, 3, 0), [], [warps, keys, columns // 2])


@constexpr_function
def of_logits(warps, keys):
    """(warps, eight rows, keys of a warp)"""
    registers = [[0, 0, 1], *bases(keys, 8, 3, 2)]
    lanes = [*bases(8, 2, 3, 2), *bases(8, 1, 3, 1)]
    return gl.DistributedLinearLayout(registers, lanes, bases(warps, 1, 3, 0), [], [warps, 8, keys])


@constexpr_function
def of_rows(warps, keys):
    """(warps, eight rows)"""
    return gl.SliceLayout(2, of_logits(warps, keys))


@constexpr_function
def of_products(warps):
    """(warps, rows, columns) of what mma gives"""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@constexpr_function
def _of_sums(warps, columns, rows):
    """(warps, columns, rows) of which a thread has what all warps have found for a place; there are as many places as
    threads, at least"""
    places = bases(rows, 1, 3, 2) + bases(columns, 1, 3, 1)
    spread = 5 + warps.bit_length() - 1
    registers = bases(warps, 1, 3, 0) + places[spread:]
    return gl.DistributedLinearLayout(registers, places[:5], places[5:spread], [], [warps, columns, rows])


@gluon.jit
def _in_turned_order(x):
    """Columns of queries or keys as mma is to sum over them."""
    x = gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 32, 4, 4, 2])
    x = gl.permute(x, (0, 1, 2, 4, 3, 5))
    return gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] * 32])


@gluon.jit
def as_queries(q):
    """The first operand: eight rows, and eight of zeros."""
    MMA: gl.constexpr = of_products(q.shape[0])
    q = gl.permute(gl.join(q, gl.full(q.shape, 0.0, q.dtype, q.type.layout)), (0, 3, 1, 2))
    q = _in_turned_order(gl.reshape(q, [q.shape[0], 16, q.shape[3]]))
    return gl.convert_layout(q, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _columns(pairs, DTYPE: gl.constexpr):
    """Both columns of each pair."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], (gl.int16, gl.int16), is_pure=True, pack=1
    )
    x = gl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True))
    return gl.reshape(x, [pairs.shape[0], pairs.shape[1], 2 * pairs.shape[2]])


@gluon.jit
def logits_of(q, k, mask, seen, scale):
    """Of eight rows and the keys that are seen, -inf of others; `mask` and `seen` lie as values' rows do."""
    WARPS: gl.constexpr = k.shape[0]
    KEYS: gl.constexpr = k.shape[1]
    MMA: gl.constexpr = of_products(WARPS)
    k = gl.permute(_in_turned_order(_columns(k, q.dtype)), (0, 2, 1))
    k = gl.convert_layout(k, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    y = ampere.mma_v2(q, k, gl.full([WARPS, 16, KEYS], 0.0, gl.float32, MMA))
    y, _ = gl.split(gl.permute(gl.reshape(y, [WARPS, 2, 8, KEYS]), (0, 2, 3, 1)))
    y = gl.convert_layout(y, of_logits(WARPS, KEYS), assert_trivial=True) * scale
    L: gl.constexpr = gl.SliceLayout(1, of_logits(WARPS, KEYS))
    mask = gl.expand_dims(gl.convert_layout(mask, L, assert_trivial=True), 1)
    return masked(y, mask, gl.expand_dims(gl.convert_layout(seen, L, assert_trivial=True), 1), None)


@gluon.jit
def column_of(place):
    """Which column a place among the columns of the sums is."""
    return place // 64 * 64 + place % 8 * 8 + place // 8 % 8


@gluon.jit
def add_values(y, shrink, p, v, DTYPE: gl.constexpr):
    """y * shrink + v.T @ p.T, with columns in the places of `column_of`."""
    MMA: gl.constexpr = y.type.layout
    y *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, MMA)), 1)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    v = _columns(v, DTYPE)
    v = gl.permute(gl.reshape(v, [v.shape[0], v.shape[1], v.shape[2] // 64, 8, 8]), (0, 2, 4, 3, 1))
    v = gl.reshape(v, [v.shape[0], y.shape[1], v.shape[4]])
    v = gl.convert_layout(v, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)
    p = gl.permute(p, (0, 2, 1))
    rounded = p.to(DTYPE)
    y = ampere.mma_v2(v, gl.convert_layout(rounded, B, assert_trivial=True), y)
    # What rounding took away counts as well.
    rest = (p - rounded.to(gl.float32)).to(DTYPE)
    return ampere.mma_v2(v, gl.convert_layout(rest, B, assert_trivial=True), y)


@gluon.jit
def weigh(logits, top, total):
    """Of one step: the weights of its keys, by what to shrink what was summed before, and the new top and total."""
    new_top = gl.maximum(top, gl.max(logits, 2))
    # While nothing is attended the top is -inf, and -inf less -inf is no number.
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp(logits - gl.expand_dims(base, 2))
    shrink = gl.exp(top - base)
    return p, shrink, new_top, total * shrink + gl.sum(p, 2)


@gluon.jit
def together(sums, ROWS: gl.constexpr):
    """What all warps have found for the first rows: sums (columns, rows), and tops and totals (1, rows)."""
    y, top, total = sums
    L: gl.constexpr = _of_sums(y.shape[0], y.shape[1], ROWS)
    LT: gl.constexpr = gl.SliceLayout(1, L)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ys = gl.allocate_shared_memory(gl.float32, y.shape, gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]), y)
    tops = gl.allocate_shared_memory(gl.float32, top.shape, PLAIN, top)
    totals = gl.allocate_shared_memory(gl.float32, top.shape, PLAIN, total)
    barrier()
    top, total = tops.slice(0, ROWS, 1).load(LT), totals.slice(0, ROWS, 1).load(LT)
    highest = gl.max(top, 0)
    weight = gl.exp(top - gl.where(highest == float("-inf"), 0.0, highest)[None, :])
    y = gl.sum(ys.slice(0, ROWS, 2).load(L) * gl.expand_dims(weight, 1), 0)
    LR: gl.constexpr = gl.SliceLayout(0, y.type.layout)
    total = gl.convert_layout(gl.sum(total * weight, 0), LR)
    return y, gl.convert_layout(highest, LR)[None, :], total[None, :]
