"""Scales and zero points of rows of packed weights, for threads that hold whole chunks of them: copied to shared memory
with the rows' codes where they are whole chunks of 16 bytes, or else read from memory.
"""

from __future__ import annotations

from qcompile.kernels._gluon import begin_copy, gl, gluon
from qcompile.kernels._operand import bases, unstack
from qcompile.kernels._rows import weight_row
from qcompile.kernels._tiles import constexpr_function
from qcompile.kernels._tuning import DotTile
from qcompile.kernels._weight import Weight


@gluon.jit
def read_sides(
    scale_ptr, zero_ptr, first, n, chunk, K: gl.constexpr, SCALE_STRIDE: gl.constexpr, ZERO_STRIDE: gl.constexpr,
    W: gl.constexpr, PARTS: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Scales and zero points of a step."""
    scales, zeros = (), ()
    scale_row = scale_ptr + first.to(gl.int64) * SCALE_STRIDE + n * SCALE_STRIDE
    if zero_ptr is not None:
        zero_row = zero_ptr + first.to(gl.int64) * ZERO_STRIDE + n * ZERO_STRIDE
    if W.group == 0:
        scales = (gl.load(scale_row),)
        if zero_ptr is not None:
            zeros = (gl.load(zero_row),)
    else:
        for part in gl.static_range(PARTS):
            at = chunk + part * CHUNKS
            scales += _load_sides(scale_row, at, K, W)
            if zero_ptr is not None:
                zeros += _load_sides(zero_row, at, K, W)
    return scales, zeros


@gluon.jit
def _load_sides(row, chunk, K: gl.constexpr, W: gl.constexpr):
    """Scales or zero points of a chunk, one for every W.sharing units; (rows, chunks) from row (rows, 1)."""
    FIELDS: gl.constexpr = W.fields
    SHARING: gl.constexpr = W.sharing
    sides = ()
    if FIELDS // SHARING % 2 == 0 and W.group == SHARING * 16 and K % (FIELDS * 16) == 0:  # neighbours are read at once
        chunk = gl.minimum(chunk, K // (FIELDS * 16) - 1)
        LAYOUT: gl.constexpr = _paired(chunk.type.layout)
        for first in gl.static_range(0, FIELDS // SHARING, 2):
            at = gl.expand_dims(row + (chunk * (FIELDS // SHARING) + first), 2)
            at = gl.convert_layout(at, LAYOUT, assert_trivial=True)
            next = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
            a, b = gl.split(gl.load(at + next))
            sides += (gl.convert_layout(a, chunk.type.layout, True), gl.convert_layout(b, chunk.type.layout, True))
    else:
        for first in gl.static_range(0, FIELDS, SHARING):
            sides += (gl.load(row + gl.minimum((chunk * FIELDS + first) * 16, K - 1) // W.group),)
    return sides


@constexpr_function
def _paired(layout):
    """That of two neighbours for each element of a slice of a blocked layout."""
    parent = layout.parent
    size = [*parent.size_per_thread[:2], 2]
    return gl.BlockedLayout(size, parent.threads_per_warp, parent.warps_per_cta, parent.order)


# Copied


@constexpr_function
def of_part(lanes, words, layout):
    """Of a part of a row: how many sides there are, how many a thread has, and how many threads have the same."""
    inputs = layout.fields * 16
    each = max(1, inputs // layout.group)
    together = 4 // words * max(1, layout.group // inputs)
    return lanes * each // together, each, together


def copied_bytes(weight: Weight, tile: DotTile) -> int:
    """Bytes that the sides of a row take, or 0 where they cannot be copied."""
    layout, (_, scale, zero, _) = weight.layout, weight.pointers
    group, columns = layout.group, weight.columns
    if not group or group & group - 1 or columns % group:
        return 0
    lanes = 32 * tile.split
    part = of_part(lanes, tile.words, layout)[0]
    count = padded(part * -(-columns // (lanes * tile.words * layout.fields * 4)))
    taken = 0
    for side, stride in [(scale, weight.strides[1])] + ([] if zero is None else [(zero, weight.strides[2])]):
        size = side.element_size()
        if side.data_ptr() % 16 or stride * size % 16 or columns // group * size % 16 or part * size < 16:
            return 0
        taken += count * size
    return taken


@gluon.jit
def make_sides(scale_ptr, zero_ptr, SLOTS: gl.constexpr, OUTPUTS: gl.constexpr, COUNT: gl.constexpr):
    """Room for the sides of steps, COUNT of a row."""
    rings = (_make(scale_ptr, SLOTS, OUTPUTS, COUNT),)
    if zero_ptr is not None:
        rings += (_make(zero_ptr, SLOTS, OUTPUTS, COUNT),)
    return rings


@constexpr_function
def padded(count):
    """Sides of a row that there is room for: a power of two."""
    return 1 << (count - 1).bit_length()


@gluon.jit
def _make(ptr, SLOTS: gl.constexpr, OUTPUTS: gl.constexpr, COUNT: gl.constexpr):
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    return gl.allocate_shared_memory(ptr.dtype.element_ty, [SLOTS, OUTPUTS, padded(COUNT)], SHARED)


@gluon.jit
def copy_sides(
    rings, slot, scale_ptr, zero_ptr, first, N, MADE: gl.constexpr, GATED: gl.constexpr, EVEN: gl.constexpr,
    GROUPS: gl.constexpr, SCALE_STRIDE: gl.constexpr, ZERO_STRIDE: gl.constexpr,
):  # fmt: skip
    """Begin to copy the sides of a step's rows, of GROUPS groups each."""
    _copy(rings[0].index(slot), scale_ptr, first, N, MADE, GATED, EVEN, GROUPS, SCALE_STRIDE)
    if zero_ptr is not None:
        _copy(rings[1].index(slot), zero_ptr, first, N, MADE, GATED, EVEN, GROUPS, ZERO_STRIDE)


@constexpr_function
def _copying(count, bits, warps):
    """16 bytes a thread, side by side along the rows."""
    wide = 128 // bits
    lanes = min(32, count // wide)
    split = min(warps, count // wide // lanes)
    return gl.BlockedLayout([1, wide], [32 // lanes, lanes], [warps // split, split], [1, 0])


@gluon.jit
def _copy(
    tile, ptr, first, N, MADE: gl.constexpr, GATED: gl.constexpr, EVEN: gl.constexpr, GROUPS: gl.constexpr,
    STRIDE: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = _copying(tile.shape[1], ptr.dtype.element_ty.primitive_bitwidth, gl.num_warps())
    row = weight_row(gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, C)), first, N, MADE, GATED, EVEN)
    group = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, C))[None, :]
    mask = None if tile.shape[1] == GROUPS else group < GROUPS
    begin_copy(tile, ptr + first.to(gl.int64) * STRIDE + (row[:, None] * STRIDE + group), mask=mask)


@gluon.jit
def copied_sides(rings, slot, PAIRS: gl.constexpr, W: gl.constexpr, PARTS: gl.constexpr, SPLIT: gl.constexpr,
                 WORDS: gl.constexpr):  # fmt: skip
    """As `read_sides`, of a step that is there."""
    zeros = ()
    if len(rings) > 1:
        zeros = _read_copied(rings[1].index(slot), PAIRS, W, PARTS, SPLIT, WORDS)
    return _read_copied(rings[0].index(slot), PAIRS, W, PARTS, SPLIT, WORDS), zeros


@constexpr_function
def _reading(outputs, count, each, together, split, warps):
    """(rows, sides), `each` of them a thread's, the same for some threads together."""
    tall = warps // split
    registers = [*bases(each, 1, 2, 1), *bases(outputs, tall, 2, 0)]
    along = [[0, 0]] * (together.bit_length() - 1) + bases(count, each, 2, 1)
    return gl.DistributedLinearLayout(registers, along[:5], along[5:] + bases(tall, 1, 2, 0), [], [outputs, count])


@constexpr_function
def _spread(outputs, count, together, split, warps):
    """(rows, sides, threads that have the same)."""
    tall = warps // split
    along = bases(together, 1, 3, 2) + bases(count, 1, 3, 1)
    registers, shape = bases(outputs, tall, 3, 0), [outputs, count, together]
    return gl.DistributedLinearLayout(registers, along[:5], along[5:] + bases(tall, 1, 3, 0), [], shape)


@gluon.jit
def _read_copied(tile, PAIRS: gl.constexpr, W: gl.constexpr, PARTS: gl.constexpr, SPLIT: gl.constexpr,
                 WORDS: gl.constexpr):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    OUTPUTS: gl.constexpr = tile.shape[0]
    COUNT: gl.constexpr = of_part(32 * SPLIT, WORDS, W)[0]
    EACH: gl.constexpr = of_part(32 * SPLIT, WORDS, W)[1]
    TOGETHER: gl.constexpr = of_part(32 * SPLIT, WORDS, W)[2]
    L: gl.constexpr = _spread(OUTPUTS, COUNT // EACH, TOGETHER, SPLIT, WARPS)
    sides = ()
    for part in gl.static_range(PARTS):
        found = tile.slice(part * COUNT, COUNT, 1).load(_reading(OUTPUTS, COUNT, EACH, TOGETHER, SPLIT, WARPS))
        found = unstack(gl.reshape(found, [1, OUTPUTS, COUNT // EACH, EACH]), EACH)
        for i in gl.static_range(EACH):
            side = gl.reshape(found[i], [OUTPUTS, COUNT // EACH])
            side = gl.expand_dims(gl.convert_layout(side, gl.SliceLayout(2, L), assert_trivial=True), 2)
            side, _ = gl.broadcast(side, gl.full([OUTPUTS, COUNT // EACH, TOGETHER], 0, side.dtype, layout=L))
            sides += (gl.convert_layout(gl.reshape(side, [OUTPUTS, 32 * SPLIT]), PAIRS, assert_trivial=True),)
    return sides
