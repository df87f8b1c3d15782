"""Rows times a quantized weight on tensor cores, with codes and x brought through shared memory some steps ahead.

A program makes 16 * warps outputs of TOKENS rows of x, or half as many of a gate and its factor. Codes become the first
operand of mma or wgmma in registers (see _operand.py); x is the second as it lies. With splits > 1 the steps are dealt
out to several programs, and linear_gemm's second kernel adds their sums.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import (
    ampere,
    barrier,
    commit_copies,
    gl,
    gluon,
    hopper,
    launch_dependents,
    launched,
    row_of,
    store_outputs,
    wait,
    wait_for_copies,
)
from qcompile.kernels._inputs import blocks, copy_inputs, input_starts, make_inputs, sums_layout
from qcompile.kernels._operand import piece_weights, read_sides, read_words, rows_layout
from qcompile.kernels._planes import copy_codes, make_planes, plane_starts
from qcompile.kernels._side_chunks import can_copy, chunk_sides, copy_chunks, make_chunks
from qcompile.kernels._tiles import cdiv, dependent_launch, launch
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_gemm import in_parts


def mma(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.MmaTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) that _gluon.can_read."""
    return in_parts(_launch, x, weight, bias, activation, tile, tile.splits)


def mma_gated(x: Tensor, weight: Weight, bias: Tensor | None, activation: str, tile: _tuning.MmaTile) -> Tensor:
    """act(gate) * factor of the halves of x @ W.T + bias, for a tile without splits."""
    out = x.new_empty(x.shape[0], weight.rows // 2)
    _launch(x, weight, bias, out, activation, tile, gated=True)
    return out


def copies_sides(weight: Weight, tile: _tuning.MmaTile, device: _tuning.Device) -> bool:
    """Are scales and zero points copied beside the codes? Else each step reads its own.

    NOTE: the linears of a layer of Llama-3-8B, u4/g64/asym, H100: 33 rows 87.4 -> 84.8 µs, 48 96.3 -> 88.2, 64 102.6 ->
    97.2, 72 114.1 -> 107.4; 17 and 32 rows 75.2 -> 73.7 and 76.6 -> 76.4. 16 rows in these tiles 64.9 -> 67.0, but in a
    chain of such layers 71.1 -> 66.9 with `down` copied, whose inputs are split.
    """
    faster = 32 < tile.tokens <= 96 or (tile.tokens == 16 and tile.splits > 1)
    timed = tile.warp_groups and weight.layout.bits == 4
    return faster and timed and can_copy(weight, tile, device.shared_bytes)


def _launch(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, activation: str | None, tile: _tuning.MmaTile,
    gated: bool = False,
) -> None:  # fmt: skip
    (m, k), n = x.shape, out.shape[-1]
    launch(
        _mma,
        (cdiv(n, (8 if gated else 16) * tile.warps) * cdiv(m, tile.tokens), tile.splits),
        x,
        *weight.pointers[:3],
        bias,
        out,
        m,
        n,
        k,
        *weight.strides,
        W=weight.layout,
        ACTIVATION=activation,
        EVEN=k % tile.codes == 0,
        TOKENS=tile.tokens,
        CODES=tile.codes,
        STAGES=tile.stages,
        WARP_GROUPS=tile.warp_groups,
        COPIED=copies_sides(weight, tile, _tuning.Device.of(x.device)),
        GATED=gated,
        PDL=dependent_launch(x) and not weight.copied,
        num_warps=tile.warps,
        maxnreg=min(255, 2048 // (tile.warps * tile.together)),
    )


@launched
def _mma(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, EVEN: gl.constexpr, TOKENS: gl.constexpr, CODES: gl.constexpr,
    STAGES: gl.constexpr, WARP_GROUPS: gl.constexpr, COPIED: gl.constexpr, GATED: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    # What is multiplied at once: whole chunks of the smallest plane.
    PIECE: gl.constexpr = max(64, 16 * W.fields)
    # A warp group's products run on while it unpacks codes of the next step, so one stage more is in use.
    AHEAD: gl.constexpr = STAGES - 2 if WARP_GROUPS else STAGES - 1
    BLOCKS: gl.constexpr = blocks(TOKENS)
    if PDL:
        launch_dependents()
    blocks_m = gl.cdiv(M, TOKENS)
    first_m = gl.program_id(0) % blocks_m * TOKENS
    first_n = gl.program_id(0) // blocks_m * (ROWS // 2 if GATED else ROWS)
    steps = gl.cdiv(K, CODES)
    first = gl.program_id(1) * steps // gl.num_programs(1)
    count = (gl.program_id(1) + 1) * steps // gl.num_programs(1) - first

    planes = make_planes(CODES, STAGES, W, ROWS)
    data = plane_starts(data_ptr, first_n, N, data_stride, CODES, W, ROWS, GATED)
    if COPIED:
        GROUPS: gl.constexpr = CODES // W.group
        chunks = make_chunks(scale_ptr, zero_ptr, first_n, N, scale_stride, zero_stride, AHEAD, ROWS, GROUPS, GATED)
    else:
        row = row_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows_layout(1, WARPS))), first_n, N, GATED)
        scale = scale_ptr + first_n.to(gl.int64) * scale_stride, row * scale_stride
        zero = None if zero_ptr is None else (zero_ptr + first_n.to(gl.int64) * zero_stride, row * zero_stride)
    for i in gl.static_range(AHEAD):
        if i < count:
            copy_codes(planes, data, i, first + i, K, CODES, W, EVEN)
            if COPIED:
                copy_chunks(chunks, first + i, GROUPS, FIRST=i == 0)
        commit_copies()
    if not COPIED:
        sides = read_sides(scale, zero, first, K, CODES, PIECE, W, EVEN)
    if PDL:
        wait()
    xs = make_inputs(DTYPE, TOKENS, CODES, STAGES)
    x = input_starts(x_ptr, first_m, M, K, TOKENS, CODES, WARPS)
    for i in gl.static_range(AHEAD):
        if i < count:
            copy_inputs(xs, x, i, first + i, K, CODES, EVEN)
        commit_copies()

    sums = ()
    for i in gl.static_range(len(BLOCKS)):
        sums += (gl.full([ROWS, BLOCKS[i][1]], 0.0, gl.float32, layout=sums_layout(BLOCKS[i][1], WARPS, WARP_GROUPS)),)
    wait_for_copies(AHEAD - 1)
    if COPIED:
        sides = chunk_sides(chunks, first, CODES, PIECE, W)
    words = read_words(planes, 0, CODES, PIECE, W, WARPS)
    a = piece_weights(words, sides, 0, CODES, PIECE, W, DTYPE)
    for step in range(count):
        if not COPIED:
            following = read_sides(scale, zero, first + step + 1, K, CODES, PIECE, W, EVEN)
        slot = step % STAGES
        if step + AHEAD < count:
            copy_codes(planes, data, (step + AHEAD) % STAGES, first + step + AHEAD, K, CODES, W, EVEN)
            copy_inputs(xs, x, (step + AHEAD) % STAGES, first + step + AHEAD, K, CODES, EVEN)
            if COPIED:
                copy_chunks(chunks, first + step + AHEAD, GROUPS)
        commit_copies()
        for piece in gl.static_range(CODES // PIECE):
            begun = ()
            for i in gl.static_range(len(BLOCKS)):
                b = xs[i].index(slot).slice(piece * PIECE, PIECE, 1).permute((1, 0))
                begun += (_multiply(gl.reshape(a, [ROWS, PIECE]), b, sums[i], WARP_GROUPS),)
            # The next piece is unpacked while this one is multiplied. Products under way at a loop's end would be
            # waited for one by one: ptxas gives up (C7515).
            if piece + 1 < CODES // PIECE:
                a = piece_weights(words, sides, piece + 1, CODES, PIECE, W, DTYPE)
            else:
                wait_for_copies(AHEAD - 1)
                sides = chunk_sides(chunks, first + step + 1, CODES, PIECE, W) if COPIED else following
                words = read_words(planes, (step + 1) % STAGES, CODES, PIECE, W, WARPS)
                a = piece_weights(words, sides, 0, CODES, PIECE, W, DTYPE)
            sums = _waited(begun) if WARP_GROUPS else begun
    barrier()  # what is stored passes through shared memory that another warp group's products may still read
    for i in gl.static_range(len(BLOCKS)):
        y = sums[i]
        if W.group == 0:
            n = first_n + row_of(gl.arange(0, ROWS, layout=gl.SliceLayout(1, y.type.layout)), first_n, N, GATED)
            y *= gl.load(scale_ptr + n.to(gl.int64) * scale_stride).to(gl.float32)[:, None]
        store_outputs(y, bias_ptr, out_ptr, first_n, first_m + BLOCKS[i][0], M, N, ACTIVATION, GATED)


@gluon.jit
def _multiply(a, b, acc, WARP_GROUPS: gl.constexpr):
    L: gl.constexpr = acc.type.layout
    a = gl.convert_layout(a, gl.DotOperandLayout(0, L, 2), assert_trivial=True)
    if WARP_GROUPS:
        acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
    else:
        acc = ampere.mma_v2(a, b.load(gl.DotOperandLayout(1, L, 2)), acc)
    return acc


@gluon.jit
def _waited(begun):
    """The sums, once they are there."""
    done = hopper.warpgroup_mma_wait(0, deps=begun)
    return done if len(begun) > 1 else (done,)
