"""Rows of x on their way through shared memory, some steps ahead of their use, and the sums that they are part of.

Shapes of tensors are powers of two, so the rows of a program lie in several blocks, the largest first.
"""

from __future__ import annotations

from qcompile.kernels._gluon import begin_copy, gl, gluon
from qcompile.kernels._tiles import constexpr_function


@constexpr_function
def blocks(tokens):
    """The powers of two that sum up to `tokens`, the largest first, each with what is before it."""
    return tuple((tokens >> i + 1 << i + 1, 1 << i) for i in reversed(range(tokens.bit_length())) if tokens >> i & 1)


@constexpr_function
def sums_layout(tokens, warps, warp_groups):
    """That of (outputs, tokens), sixteen outputs a warp."""
    version, shape = ([3, 0], [16, tokens, 16]) if warp_groups else ([2, 0], [16, 8])
    return gl.NVMMADistributedLayout(version, [warps, 1], shape)


@constexpr_function
def copy_layout(codes, warps):
    """Neighbouring threads copy neighbouring inputs."""
    return gl.BlockedLayout([1, 8], [max(1, 256 // codes), min(32, codes // 8)], [warps, 1], [1, 0])


@gluon.jit
def make_inputs(DTYPE: gl.constexpr, TOKENS: gl.constexpr, CODES: gl.constexpr, STAGES: gl.constexpr):
    """A buffer for each block."""
    BLOCKS: gl.constexpr = blocks(TOKENS)
    xs = ()
    for i in gl.static_range(len(BLOCKS)):
        xs += (gl.allocate_shared_memory(DTYPE, [STAGES, BLOCKS[i][1], CODES], gl.NVMMASharedLayout(128, 16, 2)),)
    return xs


@gluon.jit
def input_starts(x_ptr, first_m, M, K, TOKENS: gl.constexpr, CODES: gl.constexpr, WARPS: gl.constexpr):
    """Where the rows of each block begin, their inputs of a step, and which rows there are."""
    BLOCKS: gl.constexpr = blocks(TOKENS)
    x = ()
    for i in gl.static_range(len(BLOCKS)):
        x += (_rows(x_ptr, first_m + BLOCKS[i][0], M, K, BLOCKS[i][1], CODES, copy_layout(CODES, WARPS)),)
    return x


@gluon.jit
def _rows(x_ptr, first_m, M, K, TOKENS: gl.constexpr, CODES: gl.constexpr, X: gl.constexpr):
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, X))[:, None]
    k = gl.arange(0, CODES, layout=gl.SliceLayout(0, X))[None, :]
    return x_ptr + first_m.to(gl.int64) * K, m * K + k, k, m < M - first_m


@gluon.jit
def copy_inputs(xs, x, slot, step, K, CODES: gl.constexpr, EVEN: gl.constexpr):
    for i in gl.static_range(len(xs)):
        start, offset, k, inside = x[i]
        mask = inside if EVEN else inside & (k + step * CODES < K)
        begin_copy(xs[i].index(slot), start + step * CODES + offset, mask=mask)
