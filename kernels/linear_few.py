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
from qcompile.kernels._gluon import (
    ampere,
    begin_copy,
    codes,
    commit_copies,
    gl,
    gluon,
    launch_dependents,
    row_of,
    store_outputs,
    wait,
    wait_for_copies,
)
from qcompile.kernels._operand import bases, beside, floats, own_words, unstack
from qcompile.kernels._planes import copy_codes, make_planes, plane_starts
from qcompile.kernels._tiles import cdiv, constexpr_function, dependent_launch, launch, stack
from qcompile.kernels._weight import Layout, Weight
from qcompile.kernels.linear_gemm import in_parts


def can_sum(dtype: torch.dtype, layout: Layout) -> bool:
    """Do sums of codes keep what codes so narrow say? In float16 1024 stands beside each, and is taken off the sum."""
    return dtype != torch.float16 or layout.bits > 2


def few(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.FewTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) that _gluon.can_read, with codes that it can_sum."""
    return in_parts(_launch, x, weight, bias, activation, tile, tile.parts)


def few_gated(x: Tensor, weight: Weight, bias: Tensor | None, activation: str, tile: _tuning.FewTile) -> Tensor:
    """act(gate) * factor of the halves of x @ W.T + bias, for a tile of one part."""
    out = x.new_empty(x.shape[0], weight.rows // 2)
    _launch(x, weight, bias, out, activation, tile, gated=True)
    return out


def _launch(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, activation: str | None, tile: _tuning.FewTile,
    gated: bool = False,
) -> None:  # fmt: skip
    (m, k), n = x.shape, out.shape[-1]
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
        GATED=gated,
        PDL=dependent_launch(x) and not weight.copied,
        num_warps=tile.warps,
        maxnreg=min(255, 2048 // (tile.warps * tile.together)),
    )


@gluon.jit
def _few(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, EVEN: gl.constexpr, TOKENS: gl.constexpr, CODES: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, GATED: gl.constexpr, PDL: gl.constexpr,
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
    for i in gl.static_range(AHEAD):
        if i < count:
            copy_codes(planes, data, i, first + i, K, STEP, W, EVEN)
        commit_copies()
    place = gl.arange(0, ROWS, layout=gl.SliceLayout(1, _of_sides(SPLIT, TALL, CODES // SHARE)))
    row = row_of(place, first_n, N, GATED)
    scale = scale_ptr + first_n.to(gl.int64) * scale_stride, row * scale_stride
    zero = None if zero_ptr is None else (zero_ptr + first_n.to(gl.int64) * zero_stride, row * zero_stride)
    sides = _sides(scale, zero, first, K, CODES, SPLIT, W, EVEN)
    if PDL:
        wait()
    x = _starts(x_ptr, first_m, M, K, TOKENS, CODES, SPLIT)
    # Eight rows of four codes' inputs lie in different banks.
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(16, 1, min(4, CODES // 16), [2, 1, 0])
    xs = gl.allocate_shared_memory(DTYPE, [STAGES, SPLIT, TOKENS, CODES], SWIZZLE)
    for i in gl.static_range(AHEAD):
        if i < count:
            _copy_x(xs, x, i, first + i, K, STEP, EVEN)
        commit_copies()

    nothing = gl.full([SPLIT, ROWS, TOKENS], 0.0, gl.float32, layout=MMA)
    ones = gl.full([SPLIT, ROWS, PART], 1.0, DTYPE, layout=A)
    total = nothing
    for step in range(count):
        following = _sides(scale, zero, first + step + 1, K, CODES, SPLIT, W, EVEN)
        wait_for_copies(AHEAD - 1)
        slot = step % STAGES
        if step + AHEAD < count:
            copy_codes(planes, data, (step + AHEAD) % STAGES, first + step + AHEAD, K, STEP, W, EVEN)
            _copy_x(xs, x, (step + AHEAD) % STAGES, first + step + AHEAD, K, STEP, EVEN)
        commit_copies()
        words = _words(planes, slot, CODES, PIECE, W, SPLIT)
        sums, sums_x = nothing, nothing
        for piece in gl.static_range(CODES // PIECE):
            parts = _parts(words, piece, CODES, PIECE, PART, W, DTYPE, SPLIT)
            for part in gl.static_range(PIECE // PART):
                b = _inputs(xs.index(slot), piece * PIECE + part * PART, PART, MMA)
                sums = ampere.mma_v2(gl.convert_layout(parts[part], A, assert_trivial=True), b, sums)
                sums_x = ampere.mma_v2(ones, b, sums_x)
                if (piece * PIECE + part * PART + PART) % SHARE == 0:
                    total += _scaled(sums, sums_x, sides, (piece * PIECE + part * PART) // SHARE, W, DTYPE)
                    sums, sums_x = nothing, nothing
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
def _sides(scale, zero, step, K, CODES: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    """Scales and zero points of a step: of each group, (splits, rows)."""
    scales = _sides_of(scale, step, K, CODES, SPLIT, W, EVEN)
    return scales, () if zero is None else _sides_of(zero, step, K, CODES, SPLIT, W, EVEN)


@gluon.jit
def _sides_of(side, step, K, CODES: gl.constexpr, SPLIT: gl.constexpr, W: gl.constexpr, EVEN: gl.constexpr):
    SHARE: gl.constexpr = min(W.run, CODES)
    GROUPS: gl.constexpr = CODES // SHARE
    start, row = side
    ROWS: gl.constexpr = row.shape[0]
    L: gl.constexpr = _of_sides(SPLIT, gl.num_warps() // SPLIT, GROUPS)
    i = gl.arange(0, SPLIT * GROUPS, layout=gl.SliceLayout(0, L))
    if W.group == 0:
        at = i * 0
    elif EVEN and W.group == SHARE:  # neighbours, which the compiler sees
        at = gl.minimum(step, K // (SPLIT * CODES) - 1) * (SPLIT * GROUPS) + i
    else:
        at = gl.minimum(step * (SPLIT * CODES) + i * SHARE, K - 1) // W.group
    sides = gl.reshape(gl.load(start + (row[:, None] + at[None, :])), [ROWS, SPLIT, 1, GROUPS])
    return unstack(gl.permute(sides, (1, 0, 2, 3)), GROUPS)


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


# Operands. Lane t of four has the word t of each chunk, and of each unit the four inputs that its codes meet.


@constexpr_function
def _of_words(split, tall, words):
    """(rows, words of a step)."""
    registers = [*bases(words, 4, 2, 1), [8, 0]]
    lanes = [[0, 1], [0, 2], *bases(8, 1, 2, 0)]
    warps = bases(16 * tall, 16, 2, 0) + bases(split * words, words, 2, 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * tall, split * words])


@constexpr_function
def _of_chunks(split, tall, chunks):
    """(splits * rows, chunks, words of a chunk)."""
    registers = [[8, 0, 0], *bases(chunks, 1, 3, 1)]
    lanes = [[0, 0, 1], [0, 0, 2], *bases(8, 1, 3, 0)]
    warps = bases(16 * tall * split, 16, 3, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * tall * split, chunks, 4])


@gluon.jit
def _words(planes, slot, CODES: gl.constexpr, PIECE: gl.constexpr, W: gl.constexpr, SPLIT: gl.constexpr):
    """Of each plane, for each piece and chunk of its units, words (splits * rows, chunks, 4)."""
    words = _words_of(planes[0], slot, CODES, PIECE, W.fields, W.p0, SPLIT)
    if W.p1 > 0:
        words += _words_of(planes[1], slot, CODES, PIECE, W.fields, W.p1, SPLIT)
    if W.p2 > 0:
        words += _words_of(planes[2], slot, CODES, PIECE, W.fields, W.p2, SPLIT)
    return words


@gluon.jit
def _words_of(
    plane, slot, CODES: gl.constexpr, PIECE: gl.constexpr, FIELDS: gl.constexpr, WIDTH: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    TALL: gl.constexpr = gl.num_warps() // SPLIT
    CHUNKS: gl.constexpr = PIECE // (16 * FIELDS)
    COUNT: gl.constexpr = CODES * WIDTH // 128 // CHUNKS
    words = plane.index(slot).load(_of_words(SPLIT, TALL, CODES * WIDTH // 32))
    words = gl.permute(gl.reshape(words, [16 * TALL, SPLIT, COUNT, CHUNKS, 4]), (1, 0, 3, 4, 2))
    words = unstack(gl.reshape(words, [SPLIT * 16 * TALL, CHUNKS, 4, COUNT]), COUNT)
    found = ()
    for i in gl.static_range(COUNT):
        found += (gl.convert_layout(words[i], _of_chunks(SPLIT, TALL, CHUNKS), assert_trivial=True),)
    return found


@gluon.jit
def _parts(
    words, INDEX: gl.constexpr, CODES: gl.constexpr, PIECE: gl.constexpr, PART: gl.constexpr, W: gl.constexpr,
    DTYPE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """A piece's codes as floats, in parts (splits, rows, PART)."""
    FIELDS: gl.constexpr = W.fields
    TALL: gl.constexpr = gl.num_warps() // SPLIT
    own = own_words(words, 0, INDEX, W.fields, W.p0)
    if W.p1 > 0:
        own += own_words(words, CODES // PIECE * (FIELDS * W.p0 // 8), INDEX, W.fields, W.p1)
    if W.p2 > 0:
        own += own_words(words, CODES // PIECE * (FIELDS * (W.p0 + W.p1) // 8), INDEX, W.fields, W.p2)
    pairs = ()
    for field in gl.static_range(FIELDS):
        found = codes(own, field, W)
        found = gl.join(found, found)
        pairs += (floats(found, "0x4140", W.bits, DTYPE), floats(found, "0x4342", W.bits, DTYPE))
    w = gl.reshape(stack(pairs, 2 * FIELDS), [SPLIT, 16 * TALL, PIECE // (16 * FIELDS), 4, 2, FIELDS, 2])
    w = gl.reshape(gl.permute(w, (0, 1, 2, 5, 6, 3, 4)), [SPLIT, 16 * TALL, PIECE // PART, PART])
    return unstack(gl.permute(w, (0, 1, 3, 2)), PIECE // PART)


@constexpr_function
def _of_inputs(split, tall, tokens, part):
    """(splits, tokens, inputs of a part)."""
    registers = [[0, 0, 1], [0, 0, 2], *bases(part, 16, 3, 2), *bases(tokens, 8, 3, 1)]
    lanes = [[0, 0, 4], [0, 0, 8], *bases(8, 1, 3, 1)]
    warps = [[0, 0, 0]] * (tall.bit_length() - 1) + bases(split, 1, 3, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [split, tokens, part])


@gluon.jit
def _inputs(xs, AT: gl.constexpr, PART: gl.constexpr, MMA: gl.constexpr):
    """The second operand (splits, PART, tokens), in the order of the first's codes."""
    SPLIT: gl.constexpr = xs.shape[0]
    TOKENS: gl.constexpr = xs.shape[1]
    x = xs.slice(AT, PART, 2).load(_of_inputs(SPLIT, gl.num_warps() // SPLIT, TOKENS, PART))
    x = gl.permute(gl.reshape(x, [SPLIT, TOKENS, PART // 16, 4, 2, 2]), (0, 2, 4, 3, 5, 1))
    return gl.convert_layout(gl.reshape(x, [SPLIT, PART, TOKENS]), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


# Inputs


@gluon.jit
def _starts(x_ptr, first_m, M, K, TOKENS: gl.constexpr, CODES: gl.constexpr, SPLIT: gl.constexpr):
    """Where the rows of x begin, the inputs of a step (splits, tokens, CODES), and which rows there are."""
    NEXT: gl.constexpr = min(32, CODES // 8)
    L: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // NEXT, NEXT], [SPLIT, gl.num_warps() // SPLIT, 1], [2, 1, 0])
    split = gl.arange(0, SPLIT, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    m = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    k = split * CODES + gl.arange(0, CODES, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return x_ptr + first_m.to(gl.int64) * K, m * K + k, k, m < M - first_m


@gluon.jit
def _copy_x(xs, x, slot, step, K, STEP: gl.constexpr, EVEN: gl.constexpr):
    start, offset, k, inside = x
    mask = inside if EVEN else inside & (k + step * STEP < K)
    begin_copy(xs.index(slot), start + step * STEP + offset, mask=mask)
