"""Rows of packed weights in shared memory: one tile a plane, copied in the order they have in memory, so that no sector
is read twice, and read by the threads whose inputs they meet.

A tile is (rows, chunks of the smallest plane, words of the plane for such a chunk).
"""

from __future__ import annotations

from qcompile.kernels._gluon import begin_copy, commit_copies, fetch_bytes, gl, gluon, wait_for_copies
from qcompile.kernels._tiles import constexpr, constexpr_function, plane_words

# What a program has on its way while it waits for the kernel that makes x. With whole tiles under way, what is at work
# on the same multiprocessor takes up to 4.9 µs to read and convert x and up to 6.0 to add up, instead of 1.1 and 0.9.
# NOTE: a layer of Llama-3-8B with attention, u4/g64, H100: 48.5 µs; 53.2 without pieces and `fetch_later`, 50.9 without
# the pieces of gate and up, 51.0 without those of down; in gate and up three pieces at once 49.4, seven 49.9.
PIECE_BYTES = 4096
PIECES_AT_ONCE = constexpr(5)


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
    planes, index, start, first, N, FROM: gl.constexpr, COUNT: gl.constexpr, MADE: gl.constexpr, GATED: gl.constexpr,
    EVEN: gl.constexpr, PART: gl.constexpr, K: gl.constexpr, STRIDE: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Begin to copy a part of the rows FROM … FROM + COUNT - 1 of those that `weight_row` tells to tiles of that index;
    STRIDE is in chunks."""
    start += first.to(gl.int64) * (STRIDE * 4)
    low = planes[0].index(index).slice(FROM, COUNT, 0)
    _copy(low, start, first, N, FROM, MADE, GATED, EVEN, PART, K, STRIDE, W.p0)
    if W.p1 > 0:
        start += plane_words(K, W.p0)
        higher = planes[1].index(index).slice(FROM, COUNT, 0)
        _copy(higher, start, first, N, FROM, MADE, GATED, EVEN, PART, K, STRIDE, W.p1)
    if W.p2 > 0:
        start += plane_words(K, W.p1)
        highest = planes[2].index(index).slice(FROM, COUNT, 0)
        _copy(highest, start, first, N, FROM, MADE, GATED, EVEN, PART, K, STRIDE, W.p2)


@gluon.jit
def _copy(
    tile, start, first, N, FROM: gl.constexpr, MADE: gl.constexpr, GATED: gl.constexpr, EVEN: gl.constexpr,
    PART: gl.constexpr, K: gl.constexpr, STRIDE: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    C: gl.constexpr = _copying(tile.shape, gl.num_warps())
    row = FROM + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, C)))
    chunk = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, C)))
    word = gl.arange(0, tile.shape[2], layout=gl.SliceLayout(0, gl.SliceLayout(1, C)))
    at = (PART * tile.shape[1] + chunk)[None, :, None] * tile.shape[2] + word[None, None, :]
    row = weight_row(row, first, N, MADE, GATED, EVEN)[:, None, None] * (STRIDE * 4)
    begin_copy(tile, start + (row + at), mask=at < plane_words(K, WIDTH))


@gluon.jit
def weight_row(row, first, N, MADE: gl.constexpr, GATED: gl.constexpr, EVEN: gl.constexpr):
    """The weight's rows of a step that makes outputs from `first` on, less `first`: the gate's, then those of its
    factor, which lie N further on."""
    inside = row % MADE if EVEN else gl.minimum(row % MADE, N - 1 - first)
    return inside.to(gl.int64) + row // MADE * N if GATED else inside


@constexpr_function
def _copying(shape, warps):
    """16 bytes a thread, side by side along the rows."""
    beside = shape[1] * shape[2] // 4
    lanes = min(32, beside)
    split = min(warps, beside // lanes)
    pieces = shape[2] // 4
    return gl.BlockedLayout([1, 1, 4], [32 // lanes, lanes // pieces, pieces], [warps // split, split, 1], [2, 1, 0])


@gluon.jit
def copy_step(
    ring, slot, data_ptr, first, N, MADE: gl.constexpr, GATED: gl.constexpr, EVEN: gl.constexpr, PARTS: gl.constexpr,
    PIECE: gl.constexpr, K: gl.constexpr, STRIDE: gl.constexpr, W: gl.constexpr, few,
):  # fmt: skip
    """Begin to copy a step, piece by piece; the first `few` programs wait so that there are never many on their way."""
    OUTPUTS: gl.constexpr = ring[0].shape[1]
    for part in gl.static_range(PARTS):
        for row in gl.static_range(0, OUTPUTS, PIECE):
            index = slot * PARTS + part
            copy_rows(ring, index, data_ptr, first, N, row, PIECE, MADE, GATED, EVEN, part, K, STRIDE, W)
            commit_copies()
            if gl.program_id(0) < few:
                wait_for_copies(PIECES_AT_ONCE - 1)


@gluon.jit
def fetch_later(
    data_ptr, N, at_once, MADE: gl.constexpr, STEPS: gl.constexpr, GATED: gl.constexpr, STRIDE: gl.constexpr
):  # fmt: skip
    """Begin to bring half of what the program that takes this one's place will copy to the L2 cache."""
    HALF: gl.constexpr = max(1, MADE // 2)
    later = gl.program_id(0) + at_once
    if (gl.program_id(0) < at_once) & (later < gl.num_programs(0) - 1):  # the last one's rows may be fewer
        row = later.to(gl.int64) * (MADE * STEPS)
        fetch_bytes(data_ptr + row * (STRIDE * 4), HALF * STRIDE * 16)
        if GATED:
            fetch_bytes(data_ptr + (row + N) * (STRIDE * 4), HALF * STRIDE * 16)


@constexpr_function
def piece_rows(outputs, row_bytes, warps):
    """Rows that are copied at once: no fewer than give each thread something to copy."""
    rows = max(PIECE_BYTES, 512 * warps) // row_bytes
    return min(outputs, 1 << max(0, rows - 1).bit_length())


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
