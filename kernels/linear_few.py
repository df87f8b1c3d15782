"""A few rows times a quantized weight on tensor cores: bound by reading the weight, so it does little with each code.

Codes are multiplied as they are, with the power of two beside them that makes them floats (see _operand.py). What a
group's products sum up to is scaled, for which a product with ones sums up x: that is once a group and output, where
linear_mma has it once a weight. Of a program's warps, SPLIT lie side by side along a row and each takes its part of
every step, so that narrow weights, too, give all processors work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._few_operands import as_floats, few_starts, read_codes, read_inputs
from qcompile.kernels._gluon import (
    ampere,
    commit_copies,
    gl,
    gluon,
    launch_dependents,
    launched,
    row_of,
    store_outputs,
    wait,
    wait_for_copies,
)
from qcompile.kernels._inputs import copy_inputs
from qcompile.kernels._operand import bases, beside, unstack
from qcompile.kernels._planes import copy_codes, make_planes, plane_starts
from qcompile.kernels._sides import can_copy, copy_sides, fetch_sides, make_sides
from qcompile.kernels._tiles import cdiv, constexpr_function, dependent_launch, launch
from qcompile.kernels._weight import Layout, Weight
from qcompile.kernels.linear_gemm import in_parts


def can_sum(dtype: torch.dtype, layout: Layout) -> bool:
    """Do sums of codes keep what codes so narrow say? In float16 1024 stands beside each, and is taken off the sum."""
    return dtype != torch.float16 or layout.bits > 2


def few(
    x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.FewTile,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(x @ W.T + bias), in `out` if it is given, for contiguous x (M, K) that _gluon.can_read, with codes that it
    can_sum."""
    return in_parts(_launch, x, weight, bias, activation, tile, tile.parts, out)


def few_gated(
    x: Tensor, weight: Weight, bias: Tensor | None, activation: str, tile: _tuning.FewTile, out: Tensor | None = None
) -> Tensor:
    """act(gate) * factor of the halves of x @ W.T + bias, in `out` if it is given, for a tile of one part."""
    out = x.new_empty(x.shape[0], weight.rows // 2) if out is None else out
    _launch(x, weight, bias, out, activation, tile, gated=True)
    return out


def _launch(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, activation: str | None, tile: _tuning.FewTile,
    gated: bool = False,
) -> None:  # fmt: skip
    (m, k), n = x.shape, out.shape[-1]
    shared = _tuning.Device.of(x.device).shared_bytes
    room = shared // (tile.together * tile.stages) - tile.stage_bytes(weight.layout.bits)
    launch(
        _few,
        (cdiv(n, tile.rows // 2 if gated else tile.rows) * cdiv(m, tile.tokens), tile.parts),
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
        EVEN=k % (tile.codes * tile.split) == 0,
        TOKENS=tile.tokens,
        CODES=tile.codes,
        STAGES=tile.stages,
        SPLIT=tile.split,
        COPIED=weight.layout.group <= tile.codes and can_copy(weight, tile.codes * tile.split, room // tile.rows),
        GATED=gated,
        PDL=dependent_launch(x) and not weight.copied,
        num_warps=tile.warps,
        maxnreg=min(255, 2048 // (tile.warps * tile.together)),
    )


@launched
def _few(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, EVEN: gl.constexpr, TOKENS: gl.constexpr, CODES: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, COPIED: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    TALL: gl.constexpr = gl.num_warps() // SPLIT  # warps one below the other
    ROWS: gl.constexpr = 16 * TALL
    STEP: gl.constexpr = SPLIT * CODES
    AHEAD: gl.constexpr = STAGES - 1
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    # What is unpacked at once: whole chunks of the smallest plane. What shares a scale. What is multiplied at once.
    PIECE: gl.constexpr = max(64, 16 * W.fields)
    SHARE: gl.constexpr = min(W.run, CODES)
    PART: gl.constexpr = min(PIECE, SHARE)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SPLIT, TALL, 1], [1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    if PDL:
        launch_dependents()
    blocks_m = gl.cdiv(M, TOKENS)
    first_m = gl.program_id(0) % blocks_m * TOKENS
    first_n = gl.program_id(0) // blocks_m * (ROWS // 2 if GATED else ROWS)
    steps = gl.cdiv(K, STEP)
    first = gl.program_id(1) * steps // gl.num_programs(1)
    count = (gl.program_id(1) + 1) * steps // gl.num_programs(1) - first

    planes = make_planes(STEP, STAGES, W, ROWS)
    data = plane_starts(data_ptr, first_n, N, data_stride, STEP, W, ROWS, GATED)
    if COPIED:
        copied = make_sides(
            scale_ptr, zero_ptr, first_n, N, scale_stride, zero_stride, STAGES, ROWS, STEP // W.group, GATED
        )
    for i in gl.static_range(AHEAD):
        if i < count:
            copy_codes(planes, data, i, first + i, K, STEP, W, EVEN)
            if COPIED:
                copy_sides(copied, i, first + i)
        commit_copies()
    begin, end = first * STEP, gl.minimum((first + count) * STEP, K)
    fetch_sides(scale_ptr, first_n, N, scale_stride, begin, end, W, ROWS, GATED)
    if zero_ptr is not None:
        fetch_sides(zero_ptr, first_n, N, zero_stride, begin, end, W, ROWS, GATED)
    if not COPIED:
        row = row_of(
            gl.arange(0, ROWS, layout=gl.SliceLayout(1, _of_sides(SPLIT, TALL, CODES // SHARE))), first_n, N, GATED
        )
        scale = scale_ptr + first_n.to(gl.int64) * scale_stride, row * scale_stride
        zero = None if zero_ptr is None else (zero_ptr + first_n.to(gl.int64) * zero_stride, row * zero_stride)
        sides = _sides(scale, zero, first, K, CODES, SPLIT, W, EVEN)
    if PDL:
        wait()
    x = few_starts(x_ptr, first_m, M, K, TOKENS, CODES, SPLIT)
    # Eight rows of four codes' inputs lie in different banks.
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(16, 1, min(4, CODES // 16), [2, 1, 0])
    xs = (gl.allocate_shared_memory(DTYPE, [STAGES, SPLIT, TOKENS, CODES], SWIZZLE),)
    for i in gl.static_range(AHEAD):
        if i < count:
            copy_inputs(xs, x, i, first + i, K, STEP, EVEN)
        commit_copies()

    nothing = gl.full([SPLIT, ROWS, TOKENS], 0.0, gl.float32, layout=MMA)
    ones = gl.full([SPLIT, ROWS, PART], 1.0, DTYPE, layout=A)
    total = nothing
    for step in range(count):
        if not COPIED:
            following = _sides(scale, zero, first + step + 1, K, CODES, SPLIT, W, EVEN)
        wait_for_copies(AHEAD - 1)
        slot = step % STAGES
        if step + AHEAD < count:
            copy_codes(planes, data, (step + AHEAD) % STAGES, first + step + AHEAD, K, STEP, W, EVEN)
            copy_inputs(xs, x, (step + AHEAD) % STAGES, first + step + AHEAD, K, STEP, EVEN)
            if COPIED:
                copy_sides(copied, (step + AHEAD) % STAGES, first + step + AHEAD)
        commit_copies()
        if COPIED:
            sides = _copied_sides(copied, slot, SPLIT)
        words = read_codes(planes, slot, CODES, PIECE, W, SPLIT)
        sums, sums_x = nothing, nothing
        for piece in gl.static_range(CODES // PIECE):
            parts = as_floats(words, piece, CODES, PIECE, PART, W, DTYPE, SPLIT)
            for part in gl.static_range(PIECE // PART):
                b = read_inputs(xs[0].index(slot), piece * PIECE + part * PART, PART, MMA)
                sums = ampere.mma_v2(gl.convert_layout(parts[part], A, assert_trivial=True), b, sums)
                sums_x = ampere.mma_v2(ones, b, sums_x)
                if (piece * PIECE + part * PART + PART) % SHARE == 0:
                    total += _scaled(sums, sums_x, sides, (piece * PIECE + part * PART) // SHARE, W, DTYPE)
                    sums, sums_x = nothing, nothing
        if not COPIED:
            sides = following
    store_outputs(gl.sum(total, 0), bias_ptr, out_ptr, first_n, first_m, M, N, ACTIVATION, GATED)


# Scales and zero points


@constexpr_function
def _of_sides(split, tall, groups):
    """(rows, groups of a step)."""
    registers = [*bases(groups, 1, 2, 1), [8, 0]]
    lanes = [[0, 0], [0, 0], *bases(8, 1, 2, 0)]
    warps = bases(16 * tall, 16, 2, 0) + bases(split * groups, groups, 2, 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * tall, split * groups])


@gluon.jit
def _copied_sides(copied, slot, SPLIT: gl.constexpr):
    """Scales and zero points of a step: of each group, (splits, rows)."""
    L: gl.constexpr = _of_sides(SPLIT, gl.num_warps() // SPLIT, copied[0][0].shape[2] // SPLIT)
    zeros = ()
    if len(copied) > 1:
        zeros = _by_group(copied[1][0].index(slot).load(L), SPLIT)
    return _by_group(copied[0][0].index(slot).load(L), SPLIT), zeros


@gluon.jit
def _sides(scale, zero, step, K, CODES: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    """The same, from memory."""
    scales = _sides_of(scale, step, K, CODES, SPLIT, W, EVEN)
    return scales, () if zero is None else _sides_of(zero, step, K, CODES, SPLIT, W, EVEN)


@gluon.jit
def _sides_of(side, step, K, CODES: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    SHARE: gl.constexpr = min(W.run, CODES)
    GROUPS: gl.constexpr = CODES // SHARE
    start, row = side
    i = gl.arange(0, SPLIT * GROUPS, layout=gl.SliceLayout(0, _of_sides(SPLIT, gl.num_warps() // SPLIT, GROUPS)))
    if W.group == 0:
        at = i * 0
    elif EVEN and W.group == SHARE:  # neighbours, which the compiler sees
        at = gl.minimum(step, K // (SPLIT * CODES) - 1) * (SPLIT * GROUPS) + i
    else:
        at = gl.minimum(step * (SPLIT * CODES) + i * SHARE, K - 1) // W.group
    return _by_group(gl.load(start + (row[:, None] + at[None, :])), SPLIT)


@gluon.jit
def _by_group(sides, SPLIT: gl.constexpr):
    GROUPS: gl.constexpr = sides.shape[1] // SPLIT
    return unstack(gl.permute(gl.reshape(sides, [sides.shape[0], SPLIT, 1, GROUPS]), (1, 0, 2, 3)), GROUPS)


@gluon.jit
def _scaled(y, x, sides, INDEX: gl.constexpr, W: gl.constexpr, DTYPE: gl.constexpr):
    """What products of codes with x, (splits, rows, tokens), and sums of x are worth."""
    BESIDE: gl.constexpr = beside(DTYPE, W.bits)
    scales, zeros = sides
    scale = _of_rows(scales[INDEX], y)
    if len(zeros) == 0:
        y = scale * (y - x * (BESIDE + W.offset))
    elif W.added:
        y = scale * (y - x * BESIDE) + _of_rows(zeros[INDEX], y) * x
    else:
        y = scale * (y - x * (_of_rows(zeros[INDEX], y) + BESIDE))
    return y


@gluon.jit
def _of_rows(side, y):
    side = gl.convert_layout(gl.reshape(side, [y.shape[0], y.shape[1]]), gl.SliceLayout(2, y.type.layout), True)
    return gl.expand_dims(side.to(gl.float32), 2)
