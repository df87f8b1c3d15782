"""The planes of some weight rows on their way through shared memory, a few steps ahead of their use."""

from __future__ import annotations

from qcompile.kernels._gluon import begin_copy, gl, gluon, row_of
from qcompile.kernels._tiles import constexpr_function, plane_words


@gluon.jit
def make_planes(CODES: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr):
    """A buffer for the words of each plane."""
    planes = (_plane(CODES, STAGES, W.p0, ROWS),)
    if W.p1 > 0:
        planes += (_plane(CODES, STAGES, W.p1, ROWS),)
    if W.p2 > 0:
        planes += (_plane(CODES, STAGES, W.p2, ROWS),)
    return planes


@gluon.jit
def _plane(CODES: gl.constexpr, STAGES: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    # Eight rows of a chunk lie in different banks.
    CHUNKS: gl.constexpr = CODES * WIDTH // 128
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(4, max(1, 8 // CHUNKS), min(8, CHUNKS), order=[1, 0])
    return gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, CHUNKS * 4], SWIZZLE)


@constexpr_function
def _copying(codes, width, warps):
    """Neighbouring threads copy neighbouring chunks."""
    chunks = codes * width // 128
    return gl.BlockedLayout([1, 4], [max(1, 32 // chunks), min(32, chunks)], [warps, 1], [1, 0])


@gluon.jit
def plane_starts(
    data_ptr, first_n, N, data_stride, CODES: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr,
    GATED: gl.constexpr = False,
):  # fmt: skip
    """Where the rows of each plane begin, and the words of a step."""
    data = (_data_of(data_ptr, first_n, N, data_stride, CODES, W.p0, ROWS, GATED),)
    if W.p1 > 0:
        data += (_data_of(data_ptr, first_n, N, data_stride, CODES, W.p1, ROWS, GATED),)
    if W.p2 > 0:
        data += (_data_of(data_ptr, first_n, N, data_stride, CODES, W.p2, ROWS, GATED),)
    return data


@gluon.jit
def _data_of(
    data_ptr, first_n, N, data_stride, CODES: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = _copying(CODES, WIDTH, gl.num_warps())
    row = row_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), first_n, N, GATED)[:, None]
    word = gl.arange(0, CODES * WIDTH // 32, layout=gl.SliceLayout(0, L))[None, :]
    return data_ptr + first_n.to(gl.int64) * (data_stride * 4), row * (data_stride * 4) + word, word


@gluon.jit
def copy_codes(planes, data, slot, step, K, CODES: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    _copy_plane(planes[0], data[0], slot, step, K, 0, CODES, W.p0, EVEN)
    if W.p1 > 0:
        _copy_plane(planes[1], data[1], slot, step, K, plane_words(K, W.p0), CODES, W.p1, EVEN)
    if W.p2 > 0:
        before = plane_words(K, W.p0) + plane_words(K, W.p1)
        _copy_plane(planes[2], data[2], slot, step, K, before, CODES, W.p2, EVEN)


@gluon.jit
def _copy_plane(plane, data, slot, step, K, before, CODES: gl.constexpr, WIDTH: gl.constexpr, EVEN: gl.constexpr):
    start, offset, word = data
    at = step * (CODES * WIDTH // 32)
    mask = None if EVEN else word + at < plane_words(K, WIDTH)
    begin_copy(plane.index(slot), start + (before + at) + offset, mask=mask)
