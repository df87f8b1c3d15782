"""Scales and zero points on their way through shared memory in chunks of 16 bytes of a row, each of one step or more.

A step of linear_mma has 4 or 8 bytes of a row's scales. Where each reads its own, it asks for the same sector of a row
as the step before.
"""

from __future__ import annotations

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import begin_copy, gl, gluon
from qcompile.kernels._operand import by_piece, rows_layout, unstack
from qcompile.kernels._sides import make_side
from qcompile.kernels._tiles import constexpr_function
from qcompile.kernels._weight import Weight


def can_copy(weight: Weight, tile: _tuning.MmaTile, shared: int) -> bool:
    """Are steps of whole groups, and whole chunks of a row's sides where copies may begin? Are these so many that it
    pays, and has a multiprocessor's shared memory room for them?

    NOTE: 28672x4096, H100: i4/g128/sym, which has a quarter as many as u4/g64/asym, 37.8 -> 40.6 µs at 64 rows; u4/g64
    where room for a second program is lost 39.9 -> 49.7 at 33.
    """
    layout, columns = weight.layout, weight.columns
    group, codes = layout.group, tile.codes
    if not group or group & group - 1 or codes % group or columns % codes or columns // group % 16:
        return False
    (_, scale, zero, _), (_, scale_stride, zero_stride) = weight.pointers, weight.strides
    sides = [(scale, scale_stride)] + ([] if zero is None else [(zero, zero_stride)])
    sizes = [side.element_size() for side, _ in sides]
    held = sum(_slots(tile.ahead, codes // group, 8 * size) * _chunk(codes // group, 8 * size) * size for size in sizes)
    program = tile.stages * tile.stage_bytes(layout.bits) + 16 * tile.warps * held + (1 << 10)
    begin_well = all(side.data_ptr() % 16 == 0 and stride % 16 == 0 for side, stride in sides)
    return begin_well and 16 * sum(sizes) >= group and tile.together * program <= shared


@constexpr_function
def _chunk(groups, bits):
    """Sides of a chunk: 16 bytes, or those of a step."""
    return max(groups, 128 // bits)


@constexpr_function
def _slots(ahead, groups, bits):
    """Chunks of which some of so many steps ahead may be part, and the one at work."""
    return (ahead * groups - 1) // _chunk(groups, bits) + 2


@gluon.jit
def make_chunks(
    scale_ptr, zero_ptr, first_n, N, scale_stride, zero_stride, AHEAD: gl.constexpr, ROWS: gl.constexpr,
    GROUPS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Of scales, and of zero points where there are any, a buffer for the chunks of so many steps ahead, of GROUPS
    groups each, and where the rows begin."""
    sides = (_side(scale_ptr, first_n, N, scale_stride, AHEAD, ROWS, GROUPS, GATED),)
    if zero_ptr is not None:
        sides += (_side(zero_ptr, first_n, N, zero_stride, AHEAD, ROWS, GROUPS, GATED),)
    return sides


@gluon.jit
def _side(
    ptr, first_n, N, stride, AHEAD: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, GATED: gl.constexpr
):  # fmt: skip
    BITS: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    return make_side(ptr, first_n, N, stride, _slots(AHEAD, GROUPS, BITS), ROWS, _chunk(GROUPS, BITS), GATED)


@gluon.jit
def copy_chunks(sides, step, GROUPS: gl.constexpr, FIRST: gl.constexpr = False):
    """Begin to copy the chunks that begin with this step, or, of a program's first, those that have it."""
    for i in gl.static_range(len(sides)):
        _copy(sides[i], step, GROUPS, FIRST)


@gluon.jit
def _copy(side, step, GROUPS: gl.constexpr, FIRST: gl.constexpr):
    ring, start, offset = side
    STEPS: gl.constexpr = ring.shape[2] // GROUPS
    if FIRST or step % STEPS == 0:
        begin_copy(ring.index(step // STEPS % ring.shape[0]), start + step // STEPS * ring.shape[2] + offset)


@gluon.jit
def chunk_sides(sides, step, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr):
    """As _operand.read_sides, of a step that is there."""
    scales = _sides_of(sides[0][0], step, CODES, PIECE, W)
    zeros = ()
    if len(sides) > 1:
        zeros = _sides_of(sides[1][0], step, CODES, PIECE, W)
    return scales, zeros


@gluon.jit
def _sides_of(ring, step, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr):
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = CODES // W.group
    STEPS: gl.constexpr = ring.shape[2] // GROUPS
    chunk = ring.index(step // STEPS % ring.shape[0]).load(rows_layout(ring.shape[2], WARPS))
    some = unstack(gl.permute(gl.reshape(chunk, [16 * WARPS, 1, STEPS, GROUPS]), (0, 1, 3, 2)), STEPS)
    sides = some[0]
    for i in gl.static_range(1, STEPS):
        sides = gl.where(step % STEPS == i, some[i], sides)
    return by_piece(gl.reshape(sides, [16 * WARPS, GROUPS]), PIECE, W.group)
