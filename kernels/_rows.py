"""Rows of packed weights in shared memory: one tile a plane, copied in the order they have in memory, so that no sector
is read twice, and read by the threads whose inputs they meet.

A tile is (rows, chunks of the smallest plane, words of the plane for such a chunk).
"""

from __future__ import annotations

from qcompile.kernels._gluon import begin_copy, gl, gluon
from qcompile.kernels._tiles import constexpr_function, plane_words


@gluon.jit
def allocate_rows(TILES: gl.constexpr, ROWS: gl.constexpr, CHUNKS: gl.constexpr, W: gl.constexpr):
    """Of each plane, so many tiles."""
    planes = (_allocate(TILES, ROWS, CHUNKS, W.fields * W.p0 // 8),)
    if W.p1 > 0:
        planes += (_allocate(TILES, ROWS, CHUNKS, W.fields * W.p1 // 8),)
    if W.p2 > 0:
        planes += (_allocate(TILES, ROWS, CHUNKS, W.fields * W.p2 // 8),)
    return planes


@gluon.jit
def _allocate(TILES: gl.constexpr, ROWS: gl.constexpr, CHUNKS: gl.constexpr, COUNT: gl.constexpr):
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    return gl.allocate_shared_memory(gl.int32, [TILES, ROWS, CHUNKS, 4 * COUNT], SHARED)


@gluon.jit
def copy_rows(
    planes, index, start, first, N, MADE: gl.constexpr, EVEN: gl.constexpr, PART: gl.constexpr, K: gl.constexpr,
    STRIDE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Begin to copy a part of the rows that `weight_row` tells to tiles of that index; STRIDE is in chunks."""
    start += first.to(gl.int64) * (STRIDE * 4)
    _copy(planes[0].index(index), start, first, N, MADE, EVEN, PART, K, STRIDE, W.p0)
    if W.p1 > 0:
        start += plane_words(K, W.p0)
        _copy(planes[1].index(index), start, first, N, MADE, EVEN, PART, K, STRIDE, W.p1)
    if W.p2 > 0:
        start += plane_words(K, W.p1)
        _copy(planes[2].index(index), start, first, N, MADE, EVEN, PART, K, STRIDE, W.p2)


@gluon.jit
def _copy(
    tile, start, first, N, MADE: gl.constexpr, EVEN: gl.constexpr, PART: gl.constexpr, K: gl.constexpr,
    STRIDE: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = _copying(tile.shape, gl.num_warps())
    row = gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, C)))
    chunk = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, C)))
    word = gl.arange(0, tile.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, C)))
    at = (PART * tile.shape[1] + chunk)[None, :, None] * tile.shape[2] + word[None, None, :]
    row = weight_row(row, first, N, MADE, EVEN)[:, None, None] * (STRIDE * 4)
    begin_copy(tile, start + (row + at), mask=at < plane_words(K, WIDTH))


@gluon.jit
def weight_row(row, first, N, MADE: gl.constexpr, EVEN: gl.constexpr):
    """The weight's rows of a step that makes outputs from `first` on, less `first`: the gate's, then those of its
    factor, which lie N further on."""
    inside = row % MADE if EVEN else gl.minimum(row % MADE, N - 1 - first)
    return inside if row.shape[0] == MADE else inside.to(gl.int64) + row // MADE * N


@constexpr_function
def _copying(shape, warps):
    """16 bytes a thread, side by side along the rows."""
    beside = shape[1] * shape[2] // 4
    lanes = min(32, beside)
    split = min(warps, beside // lanes)
    pieces = shape[2] // 4
    return gl.BlockedLayout([1, 1, 4], [32 // lanes, lanes // pieces, pieces], [warps // split, split, 1], [2, 1, 0])


@gluon.jit
def read_words(planes, index, L: gl.constexpr, W: gl.constexpr):
    """A thread's words of its chunks, plane by plane; L is (rows, threads of a row, words of a thread)."""
    words = _read(planes[0].index(index), L, W.fields * W.p0 // 8)
    if W.p1 > 0:
        words += _read(planes[1].index(index), L, W.fields * W.p1 // 8)
    if W.p2 > 0:
        words += _read(planes[2].index(index), L, W.fields * W.p2 // 8)
    return words


@gluon.jit
def _read(tile, L: gl.constexpr, COUNT: gl.constexpr):
    WORDS: gl.constexpr = L.size_per_thread[2]
    words = ()
    for i in gl.static_range(COUNT):
        found = tile.slice(4 * i, 4, 2).load(_reading(L))
        found = gl.reshape(found, [tile.shape[0], tile.shape[1] * 4 // WORDS, WORDS])
        words += (gl.convert_layout(found, L, assert_trivial=True),)
    return words


@constexpr_function
def _reading(layout):
    """(rows, chunks, words): as many threads take a chunk as it takes."""
    words = layout.size_per_thread[2]
    return gl.BlockedLayout([1, 1, words], [1, 8 * words, 4 // words], layout.warps_per_cta, [2, 1, 0])
