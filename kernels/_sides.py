"""Scales and zero points of a program's rows on their way through shared memory, with the codes of the same steps.

Where they are read from memory by those who need them, each lane of a quad asks for the same few bytes of a row, and
each step anew: of four bits in groups of 64 that is half as many requests as for the codes.
"""

from __future__ import annotations

from qcompile.kernels._gluon import begin_copy, gl, gluon, row_of
from qcompile.kernels._tiles import constexpr_function, fetch
from qcompile.kernels._weight import Weight


def can_copy(weight: Weight, step: int, room: int) -> bool:
    """Do steps of so many inputs have sides of a row in whole chunks of 16 bytes, for which it has so much room?

    NOTE: copies of 8 bytes a row, H100: 28672x4096 of u4/g64 39.7 µs at 16 rows instead of 32.0.
    """
    _, scale, zero, _ = weight.pointers
    group = weight.layout.group
    if not group or step % group or weight.columns % step:
        return False
    sides = [(scale, weight.strides[1])] + ([] if zero is None else [(zero, weight.strides[2])])
    sizes = [step // group * side.element_size() for side, _ in sides]
    begin_well = all(side.data_ptr() % 16 == 0 and stride % 16 == 0 for side, stride in sides)
    return begin_well and min(sizes) >= 16 and sum(sizes) <= room


@constexpr_function
def _copying(groups, bits, warps):
    wide = min(groups, 128 // bits)
    near = min(32, groups // wide)
    return gl.BlockedLayout([1, wide], [32 // near, near], [warps, 1], [1, 0])


@gluon.jit
def make_sides(
    scale_ptr, zero_ptr, first_n, N, scale_stride, zero_stride, STAGES: gl.constexpr, ROWS: gl.constexpr,
    GROUPS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Of scales, and of zero points where there are any, a buffer for those of GROUPS groups a step, where the rows
    begin, and the groups of a step."""
    sides = (make_side(scale_ptr, first_n, N, scale_stride, STAGES, ROWS, GROUPS, GATED),)
    if zero_ptr is not None:
        sides += (make_side(zero_ptr, first_n, N, zero_stride, STAGES, ROWS, GROUPS, GATED),)
    return sides


@gluon.jit
def make_side(
    ptr, first_n, N, stride, STAGES: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    L: gl.constexpr = _copying(GROUPS, ptr.dtype.element_ty.primitive_bitwidth, gl.num_warps())
    ring = gl.allocate_shared_memory(
        ptr.dtype.element_ty, [STAGES, ROWS, GROUPS], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    )
    row = row_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), first_n, N, GATED)[:, None] * stride
    return ring, ptr + first_n.to(gl.int64) * stride, row + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, L))[None, :]


@gluon.jit
def copy_sides(sides, slot, step):
    for i in gl.static_range(len(sides)):
        ring, start, offset = sides[i]
        begin_copy(ring.index(slot), start + step * ring.shape[2] + offset)


@gluon.jit
def fetch_sides(ptr, first_n, N, stride, begin, end, W: gl.constexpr, ROWS: gl.constexpr, GATED: gl.constexpr):
    """Begin to bring the sides of a program's rows for inputs from `begin` up to `end` to the L2 cache, a line for each
    thread, so that what is read or copied a step ahead is there in time."""
    if W.group != 0:
        LINES: gl.constexpr = max(1, 32 * gl.num_warps() // ROWS)
        LINE: gl.constexpr = 1024 // ptr.dtype.element_ty.primitive_bitwidth
        NEAR: gl.constexpr = min(32, LINES)
        L: gl.constexpr = gl.BlockedLayout([1, 1], [32 // NEAR, NEAR], [gl.num_warps(), 1], [1, 0])
        row = row_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), first_n, N, GATED)[:, None] * stride
        group = begin // W.group + gl.arange(0, LINES, layout=gl.SliceLayout(0, L))[None, :] * LINE
        wanted = (group <= (end - 1) // W.group) & (row >= 0)
        fetch(((ptr + first_n.to(gl.int64) * stride) + (row + group)).to(gl.int64), wanted)
