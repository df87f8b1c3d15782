"""One or two rows times a quantized weight, in integers: bound by reading the weight.

x is turned into 16-bit fixed point, with a scale for each thread's 16 to 64 inputs, which is finer than bfloat16 and
float16 are; DP2A multiplies two of them with two codes at once, exactly. Around the product: an RMS norm of x, a gate's
activation and product, and a residual sum.

A program takes several whole weight rows. It copies them to shared memory before it waits for the kernel that makes x,
so that the memory has work while one kernel ends and the next begins; each thread reads what it copied itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import (
    barrier,
    codes,
    commit_copies,
    copy_words,
    gl,
    gluon,
    launch_dependents,
    load_sides,
    pick_bytes,
    pieces,
    wait,
    wait_for_copies,
    words_of,
)
from qcompile.kernels._tiles import activate, cdiv, constexpr_function, dependent_launch, launch
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
        PDL=dependent_launch(x) and not (weight.copied or copied),
        num_warps=tile.warps,
    )
    return out


@gluon.jit
def _dot(
    x_ptr, norm_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr, M, N, eps,
    K: gl.constexpr, DATA_STRIDE: gl.constexpr, SCALE_STRIDE: gl.constexpr, ZERO_STRIDE: gl.constexpr,
    W: gl.constexpr, NORM: gl.constexpr, OFFSET: gl.constexpr, ACTIVATION: gl.constexpr, GATED: gl.constexpr,
    EVEN: gl.constexpr, ROWS: gl.constexpr, OUTPUTS: gl.constexpr, SPLIT: gl.constexpr, STEPS: gl.constexpr,
    AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    # (outputs, chunks, words): a thread holds the four words of its chunk.
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS // SPLIT, SPLIT, 1], [2, 1, 0])
    PAIRS: gl.constexpr = gl.SliceLayout(2, L)
    CHUNKS: gl.constexpr = 32 * SPLIT
    FIELDS: gl.constexpr = W.fields
    PARTS: gl.constexpr = (K + CHUNKS * FIELDS * 16 - 1) // (CHUNKS * FIELDS * 16)
    SHARING: gl.constexpr = min(4, W.sharing)  # a scale for x, too, is that of no more units
    MADE: gl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    if PDL:
        launch_dependents()
    first = gl.program_id(0) * (MADE * STEPS)
    row = gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, PAIRS))
    chunk = gl.arange(0, CHUNKS, layout=gl.SliceLayout(0, PAIRS))[None, :]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    ring = gl.allocate_shared_memory(gl.int32, [AHEAD * PARTS * pieces(W), OUTPUTS, CHUNKS, 4], SHARED)
    for step in gl.static_range(AHEAD):
        here = first + step * MADE
        n = _weight_row(row, here, N, MADE, EVEN)[:, None]
        _copy(ring, step, data_ptr, here, n, chunk, word, K, DATA_STRIDE, W, PARTS)
        commit_copies()
    n = _weight_row(row, first, N, MADE, EVEN)[:, None]
    sides = _sides(scale_ptr, zero_ptr, first, n, chunk, K, SCALE_STRIDE, ZERO_STRIDE, W, PARTS, SHARING)
    norms = ()
    if norm_ptr is not None:
        for part in gl.static_range(PARTS):
            norms += _inputs(norm_ptr, chunk + part * CHUNKS, word, K, FIELDS)
    if PDL:
        wait()
    xs, grows = (), ()
    for m in gl.static_range(ROWS):
        inputs = ()
        for part in gl.static_range(PARTS):
            x_row = x_ptr + gl.minimum(m, M - 1).to(gl.int64) * (K // 4)
            inputs += _inputs(x_row, chunk + part * CHUNKS, word, K, FIELDS)
        squares = gl.full([1, CHUNKS], 0.0, gl.float32, layout=PAIRS)
        of_row = ()
        for index in gl.static_range(0, PARTS * FIELDS, SHARING):
            weights = norms[index : index + SHARING] if norm_ptr is not None else None
            fixed, square = _fixed_point(inputs[index : index + SHARING], weights, DTYPE, NORM, OFFSET, SHARING, L)
            of_row += (fixed,)
            squares += square
        xs += (of_row,)
        if NORM:
            grows += (gl.rsqrt(gl.sum(squares, 1) / K + eps),)
    barrier()  # or ptxas has x loaded after the wait for copies
    # A reduced row is one thread's, or several neighbours'.
    BESIDE: gl.constexpr = max(1, min(32, 32 * WARPS // OUTPUTS))
    SUMS: gl.constexpr = gl.BlockedLayout([1, max(1, CHUNKS // BESIDE)], [32 // BESIDE, BESIDE], [WARPS, 1], [1, 0])
    # A gate beside its factor.
    HALVES: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.SliceLayout(1, HALVES)
    for step in range(STEPS):
        here = first + step * MADE
        made = here + gl.arange(0, MADE, layout=FLAT)
        slot = step % AHEAD
        wait_for_copies(AHEAD - 1)
        scales, zeros = sides
        if STEPS > 1:
            next = here + (MADE if step + 1 < STEPS else 0)
            n = _weight_row(row, next, N, MADE, EVEN)[:, None]
            sides = _sides(scale_ptr, zero_ptr, next, n, chunk, K, SCALE_STRIDE, ZERO_STRIDE, W, PARTS, SHARING)
        for m in gl.static_range(ROWS):
            at = gl.minimum(m, M - 1).to(gl.int64) * N + made
            inside = (made < N) & (m < M)
            residual = 0.0
            if residual_ptr is not None:
                residual = gl.load(residual_ptr + at, mask=inside, other=0).to(gl.float32)
            y = _products(ring, slot, scales, zeros, xs[m], W, SHARING, PARTS, L)
            y = gl.sum(gl.convert_layout(y, SUMS), 1)
            if NORM:
                y *= gl.convert_layout(grows[m], gl.SliceLayout(1, SUMS))
            y = gl.convert_layout(y, FLAT)
            if bias_ptr is not None:
                biased = _weight_row(gl.arange(0, OUTPUTS, layout=FLAT), here, N, MADE, EVEN)
                y += gl.load(bias_ptr + here + biased).to(gl.float32)
            if GATED:
                gate, y = gl.split(gl.convert_layout(gl.permute(gl.reshape(y, [2, MADE]), [1, 0]), HALVES))
                y *= activate(gate, ACTIVATION)
            else:
                y = activate(y, ACTIVATION)
            gl.store(out_ptr + at, (y + residual).to(DTYPE), mask=inside)
        if STEPS > AHEAD:
            if step + AHEAD < STEPS:
                far = here + AHEAD * MADE
                n = _weight_row(row, far, N, MADE, EVEN)[:, None]
                _copy(ring, slot, data_ptr, far, n, chunk, word, K, DATA_STRIDE, W, PARTS)
        commit_copies()


@gluon.jit
def _weight_row(row, first, N, MADE: gl.constexpr, EVEN: gl.constexpr):
    """The weight's rows of a step that makes outputs from `first` on, less `first`: the gate's, then those of its
    factor, which lie N further on."""
    inside = row % MADE if EVEN else gl.minimum(row % MADE, N - 1 - first)
    return inside if row.shape[0] == MADE else inside.to(gl.int64) + row // MADE * N


@gluon.jit
def _copy(
    ring, slot, data_ptr, first, n, chunk, word, K: gl.constexpr, STRIDE: gl.constexpr, W: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Begin to copy a step's words to their slot."""
    data = data_ptr + first.to(gl.int64) * (STRIDE * 4) + gl.expand_dims(n, 2) * (STRIDE * 4)
    for part in gl.static_range(PARTS):
        at = gl.expand_dims(chunk + part * chunk.shape[1], 2)
        copy_words(ring, (slot * PARTS + part) * pieces(W), data, at, word, K, W)


@gluon.jit
def _sides(
    scale_ptr, zero_ptr, first, n, chunk, K: gl.constexpr, SCALE_STRIDE: gl.constexpr, ZERO_STRIDE: gl.constexpr,
    W: gl.constexpr, PARTS: gl.constexpr, SHARING: gl.constexpr,
):  # fmt: skip
    """Scales and zero points of a step."""
    scales, zeros = (), ()
    scale_row = scale_ptr + first.to(gl.int64) * SCALE_STRIDE + n * SCALE_STRIDE
    if zero_ptr is not None:
        zero_row = zero_ptr + first.to(gl.int64) * ZERO_STRIDE + n * ZERO_STRIDE
    if W.group == 0:
        scales = (gl.load(scale_row),)
        if zero_ptr is not None:
            zeros = (gl.load(zero_row),)
    else:
        for part in gl.static_range(PARTS):
            at = chunk + part * chunk.shape[1]
            scales += load_sides(scale_row, at, K, W, SHARING)
            if zero_ptr is not None:
                zeros += load_sides(zero_row, at, K, W, SHARING)
    return scales, zeros


@gluon.jit
def _products(
    ring, slot, scales, zeros, xs, W: gl.constexpr, SHARING: gl.constexpr, PARTS: gl.constexpr, L: gl.constexpr
):  # fmt: skip
    """A step's weights times x, summed by thread: (outputs, chunks)."""
    COUNT: gl.constexpr = W.fields // SHARING
    # Codes that stay where they lie in their bytes save a shift each; a unit's sum is shifted instead.
    IN_PLACE: gl.constexpr = W.p1 == 0 and W.p0 < 8
    y = 0.0
    for part in gl.static_range(PARTS):
        words = words_of(ring, (slot * PARTS + part) * pieces(W), L, W)
        for i in gl.static_range(COUNT):
            x, size, total = xs[part * COUNT + i]
            dot = 0
            for unit in gl.static_range(SHARING):
                code = codes(words, i * SHARING + unit, W, IN_PLACE)
                if IN_PLACE:
                    dot <<= W.p0
                dot = _dp2a(x[2 * unit], x[2 * unit + 1], code, dot)
            dot = gl.sum(dot, 2).to(gl.float32) * (size * _worth((i + 1) * SHARING - 1, W))
            zero = W.offset * 1.0 if len(zeros) == 0 else zeros[(part * COUNT + i) % len(zeros)].to(gl.float32)
            scale = scales[(part * COUNT + i) % len(scales)].to(gl.float32)
            # A NaN or infinity in x is in the total.
            y += dot * scale + zero * total if W.added else (dot - zero * total) * scale
    return y


@constexpr_function
def _worth(last: int, layout: Layout) -> float:
    """What one is worth in a sum of units in place, of which this is the last."""
    return 1.0 / (1 << last * layout.p0 % 8) if layout.p1 == 0 else 1.0


@gluon.jit
def _inputs(x_row, chunk, word, K, UNITS: gl.constexpr):
    """What the inputs of a chunk meet, four of 16 bits in a word, unit by unit."""
    found = ()
    for unit in gl.static_range(UNITS):
        at = gl.expand_dims((chunk * UNITS + unit) * 16, 2)
        found += (gl.load(x_row + (at // 4 + word), mask=at < K, other=0),)
    return found


@gluon.jit
def _fixed_point(
    x, weights, DTYPE: gl.constexpr, NORM: gl.constexpr, OFFSET: gl.constexpr, UNITS: gl.constexpr, L: gl.constexpr
):
    """Inputs, times the norm's weights, in fixed point: (two words for four of them, what one is worth, their sum); and
    the sum of their squares."""
    floats = ()
    largest = gl.full(x[0].shape, 0.0, gl.float32, layout=L)
    total = largest
    square = largest
    for unit in gl.static_range(UNITS):
        a, b, c, d = _four_floats(x[unit], DTYPE)
        if NORM:
            square += (a * a + b * b) + (c * c + d * d)
            if weights is not None:
                e, f, g, h = _four_floats(weights[unit], DTYPE)
                a, b, c, d = a * (e + OFFSET), b * (f + OFFSET), c * (g + OFFSET), d * (h + OFFSET)
        floats += ((a, b, c, d),)
        largest = gl.maximum(largest, gl.maximum(gl.maximum(gl.abs(a), gl.abs(b)), gl.maximum(gl.abs(c), gl.abs(d))))
        total += (a + b) + (c + d)
    size = gl.maximum(gl.max(largest, 2), 1e-30)
    scale = gl.expand_dims(32512.0 / size, 2)
    words = ()
    for unit in gl.static_range(UNITS):
        a, b, c, d = floats[unit]
        words += (
            pick_bytes(_fixed(a, scale), _fixed(b, scale), 0x5410),
            pick_bytes(_fixed(c, scale), _fixed(d, scale), 0x5410),
        )
    return (words, size * (1 / 32512), gl.sum(total, 2)), gl.sum(square, 2)


@gluon.jit
def _four_floats(x, DTYPE: gl.constexpr):
    """The four 16-bit numbers of an int64 in float32."""
    if DTYPE == gl.bfloat16:  # noqa: SIM300
        low, high = x.to(gl.int32), (x >> 32).to(gl.int32)
        return (
            (low << 16).to(gl.float32, bitcast=True),
            (low & -65536).to(gl.float32, bitcast=True),
            (high << 16).to(gl.float32, bitcast=True),
            (high & -65536).to(gl.float32, bitcast=True),
        )
    else:
        return _half(x), _half(x >> 16), _half(x >> 32), _half(x >> 48)


@gluon.jit
def _half(x):
    return x.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _fixed(x, scale):
    """round(x * scale) in the low 16 bits: 1.5 * 2**23 leaves nothing behind the point."""
    return (x * scale + 12582912.0).to(gl.int32, bitcast=True)


@gluon.jit
def _dp2a(a, b, found, dot):
    """dot + the 16-bit numbers of a and b times the bytes of `found`, summed over the four words of a thread: the first
    is the sum, the others are zeros."""
    return gl.inline_asm_elementwise(
        "{ .reg .s32 t;"
        "dp2a.lo.s32.u32 t, $4, $12, $16; dp2a.hi.s32.u32 t, $8, $12, t;"
        "dp2a.lo.s32.u32 t, $5, $13, t; dp2a.hi.s32.u32 t, $9, $13, t;"
        "dp2a.lo.s32.u32 t, $6, $14, t; dp2a.hi.s32.u32 t, $10, $14, t;"
        "dp2a.lo.s32.u32 t, $7, $15, t; dp2a.hi.s32.u32 t, $11, $15, t;"
        "mov.b32 $0, t; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [a, b, found, dot],
        gl.int32,
        is_pure=True,
        pack=4,
    )
