"""One or two rows times a quantized weight, in integers: bound by reading the weight.

x is turned into 16-bit fixed point, with a scale for each thread's 16 to 64 inputs, which is finer than bfloat16 and
float16 are; DP2A multiplies two of them with two codes at once, exactly. Each thread takes a chunk of 16 bytes from
several weight rows, warps side by side along a row, and loads it before it waits for the kernel that makes x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import codes, gl, gluon, launch_dependents, load_sides, load_words, pick_bytes, wait
from qcompile.kernels._tiles import activate, cdiv, dependent_launch, launch
from qcompile.kernels._weight import Weight


def dot(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.DotTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K), M at most 2, that _gluon.can_read."""
    m, k = x.shape
    out = x.new_empty(m, weight.rows)
    launch(
        _dot,
        (cdiv(weight.rows, tile.outputs),),
        x.view(torch.int64),
        *weight.pointers[:3],
        bias,
        out,
        m,
        weight.rows,
        k,
        *weight.strides,
        W=weight.layout,
        ACTIVATION=activation,
        WHOLE=k <= 32 * tile.split * weight.step,
        ROWS=m,
        OUTPUTS=tile.outputs,
        SPLIT=tile.split,
        PDL=dependent_launch(x) and not weight.copied,
        num_warps=tile.warps,
    )
    return out


@gluon.jit
def _dot(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, WHOLE: gl.constexpr,
    ROWS: gl.constexpr, OUTPUTS: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    # (outputs, chunks, words): a thread holds the four words of its chunk.
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS // SPLIT, SPLIT, 1], [2, 1, 0])
    PAIRS: gl.constexpr = gl.SliceLayout(2, L)
    CHUNKS: gl.constexpr = 32 * SPLIT
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    FIELDS: gl.constexpr = W.fields
    SHARING: gl.constexpr = min(4, W.sharing)  # x of more units does not fit into registers
    if PDL:
        launch_dependents()
    first_n = gl.program_id(0) * OUTPUTS
    n = gl.minimum(first_n + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, PAIRS)), N - 1).to(gl.int64)[:, None]
    chunk = gl.arange(0, CHUNKS, layout=gl.SliceLayout(0, PAIRS))[None, :]
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    data = data_ptr + gl.expand_dims(n, 2) * (data_stride * 4)
    scale_row = scale_ptr + n * scale_stride
    zero_row = None if zero_ptr is None else zero_ptr + n * zero_stride
    step = _load(data, scale_row, zero_row, chunk, word, K, W, SHARING)
    if PDL:
        wait()
    sums = (gl.full([OUTPUTS, CHUNKS], 0.0, gl.float32, layout=PAIRS),) * ROWS
    for _ in range(0, K, CHUNKS * FIELDS * 16):
        words, scales, zeros = step
        if not WHOLE:
            step = _load(data, scale_row, zero_row, chunk + CHUNKS, word, K, W, SHARING)
        for first in gl.static_range(0, FIELDS, SHARING):
            scale = 1.0 if W.group == 0 else scales[first // SHARING].to(gl.float32)
            zero = W.offset * 1.0
            if zero_ptr is not None:
                zero = (gl.load(zero_row) if W.group == 0 else zeros[first // SHARING]).to(gl.float32)
            new = ()
            for m in gl.static_range(ROWS):
                x_row = x_ptr + gl.minimum(m, M - 1).to(gl.int64) * (K // 4)
                xs, size, total = _fixed_point(x_row, (chunk * FIELDS + first) * 16, word, K, DTYPE, SHARING, L)
                dot = gl.full([OUTPUTS, CHUNKS, 4], 0, gl.int32, layout=L)
                for unit in gl.static_range(SHARING):
                    found = codes(words, first + unit, W)
                    dot = _dp2a(xs[2 * unit], found, dot, "lo")
                    dot = _dp2a(xs[2 * unit + 1], found, dot, "hi")
                dot = gl.sum(dot, 2).to(gl.float32) * size
                # A NaN or infinity in x is in the total.
                new += (sums[m] + (dot * scale + zero * total if W.added else (dot - zero * total) * scale),)
            sums = new
        chunk += CHUNKS
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    n = first_n + gl.arange(0, OUTPUTS, layout=FLAT)
    for m in gl.static_range(ROWS):
        y = gl.convert_layout(gl.sum(sums[m], 1), FLAT)
        inside = (n < N) & (m < M)
        if W.group == 0:
            y *= gl.load(scale_ptr + n.to(gl.int64) * scale_stride, mask=inside, other=0).to(gl.float32)
        if bias_ptr is not None:
            y += gl.load(bias_ptr + n, mask=inside, other=0).to(gl.float32)
        gl.store(out_ptr + m * N + n, activate(y, ACTIVATION).to(DTYPE), mask=inside)


@gluon.jit
def _load(data, scale_row, zero_row, chunk, word, K, W: gl.constexpr, SHARING: gl.constexpr):
    """Words, scales and zero points of a step."""
    words = load_words(data, gl.expand_dims(chunk, 2), word, K, W)
    zeros = () if zero_row is None else load_sides(zero_row, chunk, K, W, SHARING)
    return words, load_sides(scale_row, chunk, K, W, SHARING), zeros


@gluon.jit
def _fixed_point(x_row, k, word, K, DTYPE: gl.constexpr, UNITS: gl.constexpr, L: gl.constexpr):
    """16 * UNITS inputs from k on in fixed point, two words for four of them; what one is worth; and their sum."""
    floats = ()
    largest = gl.full([1, k.shape[1], 4], 0.0, gl.float32, layout=L)
    total = largest
    for unit in gl.static_range(UNITS):
        at = k + unit * 16
        x = gl.load(x_row + (gl.expand_dims(at // 4, 2) + word), mask=gl.expand_dims(at < K, 2), other=0)
        a, b, c, d = _four_floats(x, DTYPE)
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
    return words, size * (1 / 32512), gl.sum(total, 2)


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
def _dp2a(x, found, dot, HALF: gl.constexpr):
    """dot + two 16-bit numbers times the two low or high bytes of `found`."""
    ASM: gl.constexpr = "dp2a." + HALF + ".s32.u32 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(ASM, "=r,r,r,r", [x, found, dot], gl.int32, is_pure=True, pack=1)
