"""One or two rows times a quantized weight, in integers: bound by reading the weight.

x is turned into 16-bit fixed point (13 bits at least where codes have one), with a scale for each thread's 16 to 64
inputs, which is finer than bfloat16 and float16 are; DP2A multiplies two of them with two codes at once, exactly.
Around the product: an RMS norm of x, a gate's activation and product, and a residual sum.

A program takes several whole weight rows. It copies them to shared memory, at some widths with their scales and zero
points, before it waits for the kernel that makes x, so that the memory has work while one kernel ends and the next
begins; in pieces, so that it does not stand in the way of what is at work. A thread takes 16 to 64 neighbouring inputs
of a row (_tuning.dot_tile): of those, of x and of scales that are read it has as much as registers hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._fixed_point import dp2a, fixed_point, read_inputs
from qcompile.kernels._gluon import (
    barrier,
    codes,
    commit_copies,
    gl,
    gluon,
    launch_dependents,
    wait,
    wait_for_copies,
)
from qcompile.kernels._row_sides import copied_bytes, copied_sides, copy_sides, make_sides, of_part, read_sides
from qcompile.kernels._rows import allocate_rows, copy_step, fetch_later, piece_rows, read_words, weight_row
from qcompile.kernels._tiles import COUNTS, activate, cdiv, constexpr_function, dependent_launch, launch
from qcompile.kernels._weight import Layout, Weight


@dataclass(frozen=True)
class Around:
    """What is computed before and after the product, see ops/fused_linear.py; x's dtype is that of all its tensors."""

    norm_weight: Tensor | None = None
    eps: float | None = None
    weight_offset: float = 0.0
    residual: Tensor | None = None
    activation: str | None = None
    gated: bool = False


def dot(x: Tensor, weight: Weight, bias: Tensor | None, around: Around, tile: _tuning.DotTile) -> Tensor:
    """x @ W.T + bias, and what is around it, for contiguous x (M, K), M at most 2, that _gluon.can_read."""
    m, k = x.shape
    n, outputs = weight.rows, tile.outputs
    made = outputs
    if around.gated:  # a gate and its factor at least
        n, outputs = n // 2, max(2, outputs)
        made = outputs // 2
    out = x.new_empty(m, n)
    norm_weight = around.norm_weight
    copied = norm_weight is not None and norm_weight.data_ptr() % 16 != 0
    if norm_weight is not None:
        norm_weight = (norm_weight.clone() if copied else norm_weight.contiguous()).view(torch.int64)
    data_stride, scale_stride, zero_stride = weight.strides
    device = _tuning.Device.of(x.device)
    held = replace(tile, outputs=outputs).held(k, weight.step, weight.layout.bits)
    # NOTE: the linears of a layer of Llama-3-8B, H100: u4/g64 45.6 -> 43.1 µs, i4/g128 41.2 -> 40.3, u3/g64 44.3 ->
    # 43.5, but u2/g64 33.2 -> 35.3, u1/g64 31.8 -> 34.7.
    sides = copied_bytes(weight, tile) * outputs * min(tile.ahead, tile.steps)
    copies_sides = m == 1 and weight.layout.bits in (3, 4) and 0 < sides <= device.shared_bytes - (16 << 10) - held
    held += sides if copies_sides else 0
    # 16 warps a multiprocessor have 128 registers a thread.
    at_once = device.processors * max(1, min(device.shared_bytes // held, 16 // tile.warps))
    launch(
        _dot,
        (cdiv(n, made * tile.steps),),
        x.view(torch.int64),
        norm_weight,
        *weight.pointers[:3],
        bias,
        around.residual,
        out,
        m,
        n,
        around.eps or 0.0,
        at_once,
        K=k,
        DATA_STRIDE=data_stride,
        SCALE_STRIDE=scale_stride,
        ZERO_STRIDE=zero_stride,
        W=weight.layout,
        NORM=around.eps is not None,
        OFFSET=around.weight_offset,
        ACTIVATION=around.activation,
        GATED=around.gated,
        EVEN=n % (made * tile.steps) == 0,
        ROWS=m,
        OUTPUTS=outputs,
        SPLIT=tile.split,
        STEPS=tile.steps,
        AHEAD=min(tile.ahead, tile.steps),
        WORDS=tile.words,
        LATE=tile.late,
        COPIED=copies_sides,
        PDL=dependent_launch(x) and not (weight.copied or copied),
        num_warps=tile.warps,
    )
    return out


@gluon.jit(do_not_specialize=["at_once"], do_not_specialize_on_alignment=COUNTS)
def _dot(
    x_ptr, norm_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr, M, N, eps, at_once,
    K: gl.constexpr, DATA_STRIDE: gl.constexpr, SCALE_STRIDE: gl.constexpr, ZERO_STRIDE: gl.constexpr,
    W: gl.constexpr, NORM: gl.constexpr, OFFSET: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    EVEN: gl.constexpr, ROWS: gl.constexpr, OUTPUTS: gl.constexpr, SPLIT: gl.constexpr, STEPS: gl.constexpr,
    AHEAD: gl.constexpr, WORDS: gl.constexpr, LATE: gl.constexpr, COPIED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    # (outputs, lanes, words): a thread holds WORDS words of its chunk; the others are its neighbours'.
    L: gl.constexpr = gl.BlockedLayout([1, 1, WORDS], [1, 32, 1], [WARPS // SPLIT, SPLIT, 1], [2, 1, 0])
    PAIRS: gl.constexpr = gl.SliceLayout(2, L)
    LANES: gl.constexpr = 32 * SPLIT
    BESIDE: gl.constexpr = 4 // WORDS
    CHUNKS: gl.constexpr = LANES // BESIDE
    FIELDS: gl.constexpr = W.fields
    PARTS: gl.constexpr = (K + CHUNKS * FIELDS * 16 - 1) // (CHUNKS * FIELDS * 16)
    SHARING: gl.constexpr = min(4, W.sharing)  # a scale for x, too, is that of no more units
    MADE: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    if PDL and not LATE:
        launch_dependents()
    first = gl.program_id(0) * (MADE * STEPS)
    row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, PAIRS))
    lane = gl.arange(0, LANES, layout=gl.SliceLayout(0, PAIRS))[None, :]
    chunk = lane // BESIDE
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    word += gl.expand_dims(lane % BESIDE * WORDS, 2)
    ring = allocate_rows(AHEAD * PARTS, OUTPUTS, CHUNKS, W)
    PIECE: gl.constexpr = piece_rows(OUTPUTS, CHUNKS * FIELDS * W.bits * 2, WARPS)
    PIECES: gl.constexpr = PARTS * OUTPUTS // PIECE
    GROUPS: gl.constexpr = K // W.group if COPIED else 0
    if COPIED:
        rings = make_sides(scale_ptr, zero_ptr, AHEAD, OUTPUTS, PARTS * of_part(LANES, WORDS, W)[0])
    few = at_once if PDL else 0
    for step in gl.static_range(AHEAD):
        here = first + step * MADE
        if COPIED:
            copy_sides(rings, step, scale_ptr, zero_ptr, here, N, MADE, GATED, EVEN, GROUPS, SCALE_STRIDE, ZERO_STRIDE)
        copy_step(ring, step, data_ptr, here, N, MADE, GATED, EVEN, PARTS, PIECE, K, DATA_STRIDE, W, few)
    if not COPIED:
        n = weight_row(row, first, N, MADE, GATED, EVEN)[:, None]
        sides = read_sides(scale_ptr, zero_ptr, first, n, chunk, K, SCALE_STRIDE, ZERO_STRIDE, W, PARTS, CHUNKS)
    norms = ()
    if norm_ptr is not None:
        for part in gl.static_range(PARTS):
            norms += read_inputs(norm_ptr, chunk + part * CHUNKS, word, K, FIELDS)
    if PDL and LATE:
        launch_dependents()
    if PDL:
        # NOTE: a layer of Llama-3-8B, H100: 48.5 µs with it and 50.5 without at 4 bits, 38.8 and 39.6 at 2, but 83.8
        # and 83.1 at 8, 57.3 and 52.4 at 3.
        if W.p1 == 0 and W.p0 < 8:
            fetch_later(data_ptr, N, at_once, MADE, STEPS, GATED, DATA_STRIDE)
        wait()
    xs, squared = (), ()
    for m in gl.static_range(ROWS):
        inputs = ()
        for part in gl.static_range(PARTS):
            x_row = x_ptr + gl.minimum(m, M - 1).to(gl.int64) * (K // 4)
            inputs += read_inputs(x_row, chunk + part * CHUNKS, word, K, FIELDS)
        squares = gl.full([1, LANES], 0.0, gl.float32, layout=PAIRS)
        of_row = ()
        for index in gl.static_range(0, PARTS * FIELDS, SHARING):
            weights = norms[index : index + SHARING] if norm_ptr is not None else None
            fixed, square = fixed_point(
                inputs[index : index + SHARING], weights, DTYPE, NORM, OFFSET, SHARING, _falls(W), L
            )
            of_row += (fixed,)
            squares += square
        xs += (of_row,)
        squared += (squares,)
    # A reduced row is one thread's, or several neighbours'.
    TOGETHER: gl.constexpr = max(1, min(32, 32 * WARPS // OUTPUTS))
    ALONG: gl.constexpr = max(1, LANES // TOGETHER)
    SUMS: gl.constexpr = gl.BlockedLayout([1, ALONG], [32 // TOGETHER, TOGETHER], [WARPS, 1], [1, 0])
    # A gate beside its factor.
    HALVES: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.SliceLayout(1, HALVES if GATED else SUMS)
    residuals = _residuals(residual_ptr, first, M, N, MADE, ROWS, FLAT)
    barrier()  # or ptxas has x and the residuals loaded after the wait for copies
    for step in range(STEPS):
        here = first + step * MADE
        made = here + gl.arange(0, MADE, layout=FLAT)
        slot = step % AHEAD
        wait_for_copies((AHEAD - 1) * PIECES)
        if COPIED:
            sides = copied_sides(rings, slot, PAIRS, W, PARTS, SPLIT, WORDS)
        scales, zeros = sides
        added = residuals
        if STEPS > 1:
            next = here + (MADE if step + 1 < STEPS else 0)
            if not COPIED:
                n = weight_row(row, next, N, MADE, GATED, EVEN)[:, None]
                sides = read_sides(scale_ptr, zero_ptr, next, n, chunk, K, SCALE_STRIDE, ZERO_STRIDE, W, PARTS, CHUNKS)
            residuals = _residuals(residual_ptr, next, M, N, MADE, ROWS, FLAT)
        for m in gl.static_range(ROWS):
            y = _products(ring, slot, scales, zeros, xs[m], W, SHARING, PARTS, L)
            y = gl.sum(gl.convert_layout(y, SUMS), 1)
            if NORM:  # warps wait for one another here, not before they multiply
                y *= gl.convert_layout(gl.rsqrt(gl.sum(squared[m], 1) / K + eps), gl.SliceLayout(1, SUMS))
            y = gl.convert_layout(y, FLAT)
            if bias_ptr is not None:
                biased = weight_row(gl.arange(0, OUTPUTS, layout=FLAT), here, N, MADE, GATED, EVEN)
                y += gl.load(bias_ptr + here + biased).to(gl.float32)
            if GATED:
                gate, y = gl.split(gl.convert_layout(gl.permute(gl.reshape(y, [2, MADE]), [1, 0]), HALVES))
                y *= activate(gate, ACTIVATION)
            else:
                y = activate(y, ACTIVATION)
            if residual_ptr is not None:
                y += added[m].to(gl.float32)
            at = gl.minimum(m, M - 1).to(gl.int64) * N + made
            gl.store(out_ptr + at, y.to(DTYPE), mask=(made < N) & (m < M))
        if STEPS > AHEAD and step + AHEAD < STEPS:
            far = here + AHEAD * MADE
            if COPIED:
                copy_sides(
                    rings, slot, scale_ptr, zero_ptr, far, N, MADE, GATED, EVEN, GROUPS, SCALE_STRIDE, ZERO_STRIDE
                )
            copy_step(ring, slot, data_ptr, far, N, MADE, GATED, EVEN, PARTS, PIECE, K, DATA_STRIDE, W, 0)
        else:
            for _ in gl.static_range(PIECES):
                commit_copies()  # so that a step has always as many


@gluon.jit
def _residuals(residual_ptr, first, M, N, MADE: gl.constexpr, ROWS: gl.constexpr, FLAT: gl.constexpr):
    """What is added to a step's outputs, row by row."""
    found = ()
    if residual_ptr is not None:
        made = first + gl.arange(0, MADE, layout=FLAT)
        for m in gl.static_range(ROWS):
            at = gl.minimum(m, M - 1).to(gl.int64) * N + made
            found += (gl.load(residual_ptr + at, mask=made < N, other=0),)
    return found


@gluon.jit
def _products(
    ring, slot, scales, zeros, xs, W: gl.constexpr, SHARING: gl.constexpr, PARTS: gl.constexpr, L: gl.constexpr
):  # fmt: skip
    """A step's weights times x, summed by thread: (outputs, chunks)."""
    COUNT: gl.constexpr = W.fields // SHARING
    # Codes that stay where they lie in their bytes save a shift each: a unit's sum is shifted instead, or x is.
    IN_PLACE: gl.constexpr = W.p1 == 0 and W.p0 < 8
    y = 0.0
    for part in gl.static_range(PARTS):
        words = read_words(ring, slot * PARTS + part, L, W)
        for i in gl.static_range(COUNT):
            x, size, total = xs[part * COUNT + i]
            dot = 0
            for unit in gl.static_range(SHARING):
                code = codes(words, i * SHARING + unit, W, IN_PLACE)
                if IN_PLACE and not _falls(W):
                    dot <<= W.p0
                dot = dp2a(x[2 * unit], x[2 * unit + 1], code, dot)
            dot = gl.sum(dot, 2).to(gl.float32) * (size * _worth(i * SHARING, SHARING, W))
            zero = W.offset * 1.0 if len(zeros) == 0 else zeros[_side(part * COUNT + i, SHARING, W)].to(gl.float32)
            scale = scales[_side(part * COUNT + i, SHARING, W)].to(gl.float32)
            # A NaN or infinity in x is in the total.
            y += dot * scale + zero * total if W.added else (dot - zero * total) * scale
    return y


@constexpr_function
def _side(index: int, units: int, layout: Layout) -> int:
    """Where the scale of the index-th so many units is among those of `read_sides`."""
    return index * units // layout.sharing if layout.group else 0


@constexpr_function
def _falls(layout: Layout) -> bool:
    """Are inputs that meet the next unit's codes half as large? Of four units that leaves 13 bits at least.

    NOTE: the linears of a layer of Llama-3-8B, u1/g64, H100: 30.6 -> 29.6 µs.
    """
    return layout.bits == 1


@constexpr_function
def _worth(first: int, units: int, layout: Layout) -> float:
    """What one is worth in a sum of so many units in place, of which this is the first."""
    place = first if _falls(layout) else first + units - 1
    return 1.0 / (1 << place * layout.p0 % 8) if layout.p1 == 0 else 1.0
