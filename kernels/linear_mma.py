"""Rows times a quantized weight on tensor cores, with codes and x brought through shared memory some steps ahead.

A program makes 16 * warps outputs of TOKENS rows of x. Codes become the first operand of mma or wgmma in registers (see
_operand.py); x is the second as it lies. With splits > 1 the steps are dealt out to several programs, and linear_gemm's
second kernel adds their sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import (
    ampere,
    begin_copy,
    commit_copies,
    gl,
    gluon,
    hopper,
    launch_dependents,
    wait,
    wait_for_copies,
)
from qcompile.kernels._operand import piece_weights, read_sides, read_words, rows_layout
from qcompile.kernels._tiles import activate, cdiv, constexpr_function, dependent_launch, launch, plane_words
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_gemm import finish


def mma(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.MmaTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) that _gluon.can_read."""
    (m, k), n = x.shape, weight.rows
    out = x.new_empty(m, n)
    split = tile.splits > 1
    parts = x.new_empty(tile.splits, m, n, dtype=torch.float32) if split else out
    launch(
        _mma,
        (cdiv(n, 16 * tile.warps) * cdiv(m, tile.tokens), tile.splits),
        x,
        *weight.pointers[:3],
        None if split else bias,
        parts,
        m,
        n,
        k,
        *weight.strides,
        W=weight.layout,
        ACTIVATION=None if split else activation,
        EVEN=k % tile.codes == 0,
        TOKENS=tile.tokens,
        CODES=tile.codes,
        STAGES=tile.stages,
        WARP_GROUPS=tile.warp_groups,
        PDL=dependent_launch(x) and not weight.copied,
        num_warps=tile.warps,
        maxnreg=min(255, 2048 // (tile.warps * tile.together)),
    )
    if split:
        finish(parts, bias, out, activation)
    return out


@gluon.jit
def _mma(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, EVEN: gl.constexpr, TOKENS: gl.constexpr, CODES: gl.constexpr,
    STAGES: gl.constexpr, WARP_GROUPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    # What is multiplied at once: whole chunks of the smallest plane.
    PIECE: gl.constexpr = max(64, 16 * W.fields)
    # A warp group's products run on while it unpacks codes of the next step, so one stage more is in use.
    AHEAD: gl.constexpr = STAGES - 2 if WARP_GROUPS else STAGES - 1
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0] if WARP_GROUPS else [2, 0], [WARPS, 1], [16, TOKENS, 16] if WARP_GROUPS else [16, 8]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    X: gl.constexpr = gl.BlockedLayout([1, 8], [max(1, 256 // CODES), min(32, CODES // 8)], [WARPS, 1], [1, 0])
    if PDL:
        launch_dependents()
    blocks_m = gl.cdiv(M, TOKENS)
    first_m = gl.program_id(0) % blocks_m * TOKENS
    first_n = gl.program_id(0) // blocks_m * ROWS
    steps = gl.cdiv(K, CODES)
    first = gl.program_id(1) * steps // gl.num_programs(1)
    count = (gl.program_id(1) + 1) * steps // gl.num_programs(1) - first

    planes = _planes(CODES, STAGES, W, ROWS)
    data = _data(data_ptr, first_n, N, data_stride, CODES, W, ROWS)
    row = gl.minimum(gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows_layout(1, WARPS))), N - 1 - first_n)
    scale = scale_ptr + first_n.to(gl.int64) * scale_stride, row * scale_stride
    zero = None if zero_ptr is None else (zero_ptr + first_n.to(gl.int64) * zero_stride, row * zero_stride)
    for i in gl.static_range(AHEAD):
        if i < count:
            _copy_codes(planes, data, i, first + i, K, CODES, W, EVEN)
        commit_copies()
    sides = read_sides(scale, zero, first, K, CODES, PIECE, W, EVEN)
    if PDL:
        wait()
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, X))[:, None]
    k = gl.arange(0, CODES, layout=gl.SliceLayout(0, X))[None, :]
    x = x_ptr + first_m.to(gl.int64) * K, m * K + k
    inside = m < M - first_m
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, CODES], gl.NVMMASharedLayout(128, 16, 2))
    for i in gl.static_range(AHEAD):
        if i < count:
            _copy_x(xs, x, k, inside, i, first + i, K, CODES, EVEN)
        commit_copies()

    acc = gl.full([ROWS, TOKENS], 0.0, gl.float32, layout=MMA)
    for step in range(count):
        following = read_sides(scale, zero, first + step + 1, K, CODES, PIECE, W, EVEN)
        wait_for_copies(AHEAD - 1)
        slot = step % STAGES
        if step + AHEAD < count:
            _copy_codes(planes, data, (step + AHEAD) % STAGES, first + step + AHEAD, K, CODES, W, EVEN)
            _copy_x(xs, x, k, inside, (step + AHEAD) % STAGES, first + step + AHEAD, K, CODES, EVEN)
        commit_copies()
        words = read_words(planes, slot, CODES, PIECE, W, WARPS)
        for piece in gl.static_range(CODES // PIECE):
            a = piece_weights(words, sides, piece, CODES, PIECE, W, DTYPE)
            a = gl.convert_layout(gl.reshape(a, [ROWS, PIECE]), A, assert_trivial=True)
            b = xs.index(slot).slice(piece * PIECE, PIECE, 1).permute((1, 0))
            if WARP_GROUPS:
                acc = hopper.warpgroup_mma_wait(1, deps=(hopper.warpgroup_mma(a, b, acc, is_async=True),))
            else:
                acc = ampere.mma_v2(a, b.load(gl.DotOperandLayout(1, MMA, 2)), acc)
        sides = following
    if WARP_GROUPS:
        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
    _store(acc, scale_ptr, bias_ptr, out_ptr, first_n, first_m, M, N, scale_stride, W, ACTIVATION, ROWS, TOKENS)


# Shared memory


@gluon.jit
def _planes(CODES: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr):
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
def _data(data_ptr, first_n, N, data_stride, CODES: gl.constexpr, W: gl.constexpr, ROWS: gl.constexpr):
    """Where the rows of each plane begin, and the words of a step."""
    data = (_data_of(data_ptr, first_n, N, data_stride, CODES, W.p0, ROWS),)
    if W.p1 > 0:
        data += (_data_of(data_ptr, first_n, N, data_stride, CODES, W.p1, ROWS),)
    if W.p2 > 0:
        data += (_data_of(data_ptr, first_n, N, data_stride, CODES, W.p2, ROWS),)
    return data


@gluon.jit
def _data_of(data_ptr, first_n, N, data_stride, CODES: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    L: gl.constexpr = _copying(CODES, WIDTH, ROWS // 16)
    row = gl.minimum(gl.arange(0, ROWS, layout=gl.SliceLayout(1, L)), N - 1 - first_n)[:, None]
    word = gl.arange(0, CODES * WIDTH // 32, layout=gl.SliceLayout(0, L))[None, :]
    return data_ptr + first_n.to(gl.int64) * (data_stride * 4), row * (data_stride * 4) + word, word


@gluon.jit
def _copy_codes(planes, data, slot, step, K, CODES: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
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


@gluon.jit
def _copy_x(xs, x, k, inside, slot, step, K, CODES: gl.constexpr, EVEN: gl.constexpr):
    start, offset = x
    mask = inside if EVEN else inside & (k + step * CODES < K)
    begin_copy(xs.index(slot), start + step * CODES + offset, mask=mask)


@gluon.jit
def _store(
    acc, scale_ptr, bias_ptr, out_ptr, first_n, first_m, M, N, scale_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    # Neighbouring threads write neighbouring outputs.
    WIDE: gl.constexpr = min(32, ROWS // 4)
    L: gl.constexpr = gl.BlockedLayout([4, 1], [WIDE, 32 // WIDE], [1, gl.num_warps()], [0, 1])
    n = first_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    m = first_m + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, L))
    y = gl.convert_layout(acc, L)
    if W.group == 0:
        scale = gl.load(scale_ptr + gl.minimum(n, N - 1).to(gl.int64) * scale_stride)
        y *= scale.to(gl.float32)[:, None]
    if bias_ptr is not None:
        y += gl.load(bias_ptr + n, mask=n < N, other=0).to(gl.float32)[:, None]
    row = gl.program_id(1).to(gl.int64) * M + m.to(gl.int64)
    y = activate(y, ACTIVATION).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + row[None, :] * N + n[:, None], y, mask=(m < M)[None, :] & (n < N)[:, None])
