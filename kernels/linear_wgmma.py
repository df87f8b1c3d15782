"""Many rows times a quantized weight on tensor cores of Hopper: two warp groups that multiply, and warps that fetch.

A tile is 128 outputs of TOKENS rows of x, or 64 of a gate and its factor. A warp group turns the codes of its 64
weight rows into the first operand of wgmma in registers (see _operand.py); x is the second as it lies in shared memory.
Each goes at its own pace: one unpacks while the other's products run. Four more warps copy codes and x some steps
ahead, also those of the program's next tile. Where tiles are too few to give all programs a turn, or another one, their
steps are dealt out to several, and linear_gemm's second kernel adds the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning, _turns
from qcompile.kernels._gluon import (
    async_copy,
    barrier,
    gl,
    gluon,
    hopper,
    launch_dependents,
    mbarrier,
    row_of,
    wait,
)
from qcompile.kernels._inputs import blocks, copy_inputs, input_starts, make_inputs, sums_layout
from qcompile.kernels._operand import piece_weights, read_sides, read_words, rows_layout
from qcompile.kernels._planes import copy_codes, make_planes, plane_starts
from qcompile.kernels._tiles import activate, cdiv, constexpr_function, dependent_launch, launch
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_gemm import finish

# Of the inputs of a step, what is unpacked while as many are multiplied.
PIECE = 64
# Registers of a thread: of those that multiply, of those that fetch, and of all as they are launched.
MULTIPLYING, FETCHING, LAUNCHED = 208, 88, 168


def wgmma(
    x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _turns.WgmmaTile,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(x @ W.T + bias), in `out` if it is given, for contiguous x (M, K) that _gluon.can_read."""
    m, n, parts = x.shape[0], weight.rows, None
    out = x.new_empty(m, n) if out is None else out
    first = _turns.whole_outputs(tile, m, n, _tuning.Device.of(x.device))
    if first < n:
        parts = x.new_empty(tile.shares, m, n - first, dtype=torch.float32)
    _launch(x, weight, bias, out, parts, activation, tile)
    if parts is not None:
        finish(parts, None if bias is None else bias[first:], out[:, first:], activation)
    return out


def wgmma_gated(
    x: Tensor, weight: Weight, bias: Tensor | None, activation: str, tile: _turns.WgmmaTile, out: Tensor | None = None
) -> Tensor:
    """act(gate) * factor of the halves of x @ W.T + bias, in `out` if it is given, for a tile without splits; none is
    made in parts."""
    out = x.new_empty(x.shape[0], weight.rows // 2) if out is None else out
    _launch(x, weight, bias, out, None, activation, tile, gated=True)
    return out


def _launch(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, parts: Tensor | None, activation: str | None,
    tile: _turns.WgmmaTile, gated: bool = False,
) -> None:  # fmt: skip
    (m, k), n = x.shape, out.shape[-1]
    down = cdiv(m, tile.tokens)
    tiles = whole = cdiv(n, 64 if gated else 128) * down
    if parts is not None:
        whole = (n - parts.shape[2]) // 128 * down
        tiles = whole + (tiles - whole) * tile.shares
    launch(
        _wgmma,
        (min(tiles, _tuning.Device.of(x.device).processors),),
        x,
        *weight.pointers[:3],
        bias,
        out,
        parts,
        m,
        n,
        k,
        *weight.strides,
        whole,
        1 if parts is None else tile.shares,
        W=weight.layout,
        ACTIVATION=activation,
        EVEN=k % _turns.WGMMA_CODES == 0,
        TOKENS=tile.tokens,
        CODES=_turns.WGMMA_CODES,
        PIECE=max(PIECE, weight.step),
        STAGES=tile.stages,
        GATED=gated,
        MULTIPLYING=MULTIPLYING,
        FETCHING=FETCHING,
        PDL=dependent_launch(x),
        num_warps=4,
        maxnreg=LAUNCHED,
    )


# Where sixteen divides M, each step has fewer addresses to find, and stores have fewer masks.
@gluon.jit(do_not_specialize=["whole"])
def _wgmma(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, parts_ptr, M, N, K, data_stride, scale_stride,
    zero_stride, whole, shares, W: gl.constexpr, ACTIVATION: gl.constexpr, EVEN: gl.constexpr, TOKENS: gl.constexpr,
    CODES: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, MULTIPLYING: gl.constexpr,
    FETCHING: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    upper, lower = make_planes(CODES, STAGES, W, 64), make_planes(CODES, STAGES, W, 64)
    xs = make_inputs(x_ptr.dtype.element_ty, TOKENS, CODES, STAGES)
    # A slot is full when all threads that fetch have, and free when both warp groups have multiplied it.
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=128)
        mbarrier.init(free.index(i), count=2)
    if PDL:
        launch_dependents()
        wait()
    HALF: gl.constexpr = 32 if GATED else 64  # outputs of a warp group
    shared = (xs, full, free)
    sizes = (M, N, K, whole, shares)
    sides = (scale_ptr, zero_ptr, scale_stride, zero_stride)
    stores = (bias_ptr, out_ptr, parts_ptr)
    gl.warp_specialize(
        [
            (
                _multiply,
                (upper, shared, sides, stores, 0, sizes, W, ACTIVATION, EVEN, TOKENS, CODES, PIECE, STAGES, HALF),
            ),
            (
                _multiply,
                (lower, shared, sides, stores, HALF, sizes, W, ACTIVATION, EVEN, TOKENS, CODES, PIECE, STAGES, HALF),
            ),
            (_fetch, (upper, lower, shared, x_ptr, data_ptr, data_stride, sizes, W, EVEN, TOKENS, CODES, STAGES, HALF)),
        ],
        [4, 4],
        [MULTIPLYING, FETCHING],
    )


@gluon.jit
def _tiles(sizes, TOKENS: gl.constexpr, HALF: gl.constexpr):
    M, N, K, whole, shares = sizes
    return whole + (gl.cdiv(M, TOKENS) * gl.cdiv(N, 2 * HALF) - whole) * shares


@gluon.jit
def _tile(index, sizes, TOKENS: gl.constexpr, CODES: gl.constexpr, HALF: gl.constexpr):
    """The first row of x and the first output of a tile, its first step and how many there are, and its part; -1 if it
    is whole."""
    M, N, K, whole, shares = sizes
    # Neighbouring tiles share their weights.
    blocks_m = gl.cdiv(M, TOKENS)
    steps = gl.cdiv(K, CODES)
    block, part, first, end = index, -1, 0, steps
    if index >= whole:
        others = blocks_m * gl.cdiv(N, 2 * HALF) - whole
        part, block = (index - whole) // others, whole + (index - whole) % others
        first, end = part * steps // shares, (part + 1) * steps // shares
    first_n = block // blocks_m * (2 * HALF)
    return block % blocks_m * TOKENS, first_n, first, end - first, part


@gluon.jit
def _fetch(
    upper, lower, shared, x_ptr, data_ptr, data_stride, sizes, W: gl.constexpr, EVEN: gl.constexpr,
    TOKENS: gl.constexpr, CODES: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Bring codes and x to shared memory, step by step, as soon as a slot is free."""
    xs, full, free = shared
    M, N, K, whole, shares = sizes
    done = 0
    for index in range(gl.program_id(0), _tiles(sizes, TOKENS, HALF), gl.num_programs(0)):
        first_m, first_n, first, count, part = _tile(index, sizes, TOKENS, CODES, HALF)
        above = plane_starts(data_ptr, first_n, N, data_stride, CODES, W, 64, HALF == 32)
        below = plane_starts(data_ptr, first_n + HALF, N, data_stride, CODES, W, 64, HALF == 32)
        x = input_starts(x_ptr, first_m, M, K, TOKENS, CODES, gl.num_warps())
        for step in range(count):
            slot = (done + step) % STAGES
            mbarrier.wait(free.index(slot), (done + step) // STAGES % 2 ^ 1)
            copy_codes(upper, above, slot, first + step, K, CODES, W, EVEN)
            copy_codes(lower, below, slot, first + step, K, CODES, W, EVEN)
            copy_inputs(xs, x, slot, first + step, K, CODES, EVEN)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        done += count


@gluon.jit
def _multiply(
    planes, shared, sides, stores, offset, sizes, W: gl.constexpr, ACTIVATION: gl.constexpr, EVEN: gl.constexpr,
    TOKENS: gl.constexpr, CODES: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """The products of 64 weight rows of each tile, which make the HALF outputs from `offset` on."""
    GATED: gl.constexpr = HALF == 32
    WARPS: gl.constexpr = gl.num_warps()
    BLOCKS: gl.constexpr = blocks(TOKENS)
    PIECES: gl.constexpr = CODES // PIECE
    xs, full, free = shared
    DTYPE: gl.constexpr = xs[0].dtype
    M, N, K, whole, shares = sizes
    scale_ptr, zero_ptr, scale_stride, zero_stride = sides
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, rows_layout(1, WARPS)))
    done = 0
    for index in range(gl.program_id(0), _tiles(sizes, TOKENS, HALF), gl.num_programs(0)):
        first_m, first_n, first, count, part = _tile(index, sizes, TOKENS, CODES, HALF)
        first_n += offset
        near = row_of(row, first_n, N, GATED)
        scale = scale_ptr + first_n.to(gl.int64) * scale_stride, near * scale_stride
        zero = None if zero_ptr is None else (zero_ptr + first_n.to(gl.int64) * zero_stride, near * zero_stride)
        sums = ()
        for i in gl.static_range(len(BLOCKS)):
            sums += (gl.full([64, BLOCKS[i][1]], 0.0, gl.float32, layout=sums_layout(BLOCKS[i][1], WARPS, True)),)
        now = read_sides(scale, zero, first, K, CODES, PIECE, W, EVEN)
        mbarrier.wait(full.index(done % STAGES), done // STAGES % 2)
        words = read_words(planes, done % STAGES, CODES, PIECE, W, WARPS)
        a = piece_weights(words, now, 0, CODES, PIECE, W, DTYPE)
        for step in range(count):
            slot = (done + step) % STAGES
            next = done + gl.minimum(step + 1, count - 1)
            following = read_sides(scale, zero, first + step + 1, K, CODES, PIECE, W, EVEN)
            for piece in gl.static_range(PIECES):
                begun = ()
                for i in gl.static_range(len(BLOCKS)):
                    b = xs[i].index(slot).slice(piece * PIECE, PIECE, 1).permute((1, 0))
                    begun += (_begun(gl.reshape(a, [64, PIECE]), b, sums[i], WARPS),)
                if piece + 1 == PIECES:
                    mbarrier.wait(full.index(next % STAGES), next // STAGES % 2)
                    later = read_words(planes, next % STAGES, CODES, PIECE, W, WARPS)
                # Products under way at a loop's end would be waited for one by one: ptxas gives up (C7515).
                sums = _waited(begun, len(BLOCKS)) if piece > 0 else begun
                if piece + 1 < PIECES:
                    a = piece_weights(words, now, piece + 1, CODES, PIECE, W, DTYPE)
            words, now = later, following
            a = piece_weights(words, now, 0, CODES, PIECE, W, DTYPE)
            sums = _waited(sums, 0)
            barrier()  # all four warps have multiplied
            mbarrier.arrive(free.index(slot), count=1)
        done += count
        if part < 0:
            for i in gl.static_range(len(BLOCKS)):
                y, n = _scaled(sums[i], scale_ptr, scale_stride, first_n, N, W, GATED)
                _store_made(y, stores, first_n, n, first_m + BLOCKS[i][0], M, N, ACTIVATION, GATED)
        elif stores[2] is not None:
            # Those of outputs behind the whole ones, part by part.
            before = whole // gl.cdiv(M, TOKENS) * (2 * HALF)
            for i in gl.static_range(len(BLOCKS)):
                y, n = _scaled(sums[i], scale_ptr, scale_stride, first_n, N, W, GATED)
                _store(y, stores[2], first_n - before, first_m + BLOCKS[i][0], part, M, N - before)


@gluon.jit
def _scaled(y, scale_ptr, scale_stride, first_n, N, W: gl.constexpr, GATED: gl.constexpr):
    """Sums, whole if a scale is a row's; and the weight's row of each, less first_n."""
    n = row_of(gl.arange(0, 64, layout=gl.SliceLayout(1, y.type.layout)), first_n, N, GATED)
    if W.group == 0:
        at = first_n.to(gl.int64) * scale_stride + n * scale_stride
        y *= gl.load(scale_ptr + at).to(gl.float32)[:, None]
    return y, n


@gluon.jit
def _store_made(y, stores, first_n, n, first_m, M, N, ACTIVATION: gl.constexpr, GATED: gl.constexpr):
    """Write act(y + bias), or act(gate) * factor, to out; n is the weight's row of each of y's, less first_n."""
    if stores[0] is not None:
        y += gl.load(stores[0] + (first_n + n)).to(gl.float32)[:, None]
    if GATED:
        y = gl.convert_layout(_beside(y), pairs_layout(y.shape[1]), assert_trivial=True)
        gate, y = gl.split(y)
        y *= activate(gate, ACTIVATION)
    else:
        y = activate(y, ACTIVATION)
    _store(y.to(stores[1].dtype.element_ty), stores[1], first_n, first_m, 0, M, N)


@gluon.jit
def _begun(a, b, acc, WARPS: gl.constexpr):
    """acc + a @ b, under way."""
    L: gl.constexpr = sums_layout(b.shape[1], WARPS, True)
    a = gl.convert_layout(a, gl.DotOperandLayout(0, L, 2), assert_trivial=True)
    return hopper.warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def _waited(begun, LEFT: gl.constexpr):
    """The sums, once no more than so many products are under way."""
    done = hopper.warpgroup_mma_wait(LEFT, deps=begun)
    return done if len(begun) > 1 else (done,)


@gluon.jit
def _beside(y):
    """Sums of a warp's sixteen rows, those of the gate and those of the factor in a last axis."""
    y = gl.permute(gl.reshape(y, [y.shape[0] // 16, 2, 8, y.shape[1]]), (0, 2, 3, 1))
    return gl.reshape(y, [y.shape[0] * 8, y.shape[2], 2])


@constexpr_function
def pairs_layout(tokens):
    """Of sums (32, tokens, 2) that a thread of wgmma has: a gate and its factor side by side."""
    columns = [[0, 1 << i, 0] for i in range(tokens.bit_length() - 1)]
    lanes = [*columns[1:3], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], columns[0], *columns[3:]], lanes, [[8, 0, 0], [16, 0, 0]], [], [32, tokens, 2]
    )


@gluon.jit
def _store(y, out_ptr, first_n, first_m, part, M, N):
    """Write y (outputs, rows of x) to a part of out (parts, M, N), 32 bytes at least together."""
    WIDE: gl.constexpr = y.dtype.primitive_bitwidth == 32
    # Numbers of 16 bits change places among the lanes of a warp, which has whole rows.
    ACROSS: gl.constexpr = y.shape[0] // (8 * gl.num_warps())
    NEAR: gl.constexpr = gl.BlockedLayout([8, 1], [ACROSS, 32 // ACROSS], [gl.num_warps(), 1], [0, 1])
    L: gl.constexpr = y.type.layout if WIDE else NEAR
    n = first_n + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, L))
    m = first_m + gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, L))
    row = part * M.to(gl.int64) + m.to(gl.int64)
    at = row[None, :] * N + n[:, None]
    gl.store(out_ptr + at, gl.convert_layout(y, L), mask=(m < M)[None, :] & (n < N)[:, None])
