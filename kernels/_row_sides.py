"""Scales and zero points of rows of packed weights, for threads that hold whole chunks of them."""

from __future__ import annotations

from qcompile.kernels._gluon import gl, gluon
from qcompile.kernels._tiles import constexpr_function


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
