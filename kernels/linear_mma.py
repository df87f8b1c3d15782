"""Some rows times a quantized weight, on tensor cores without shared memory.

A tile of the weight, 16 rows by 64 to 512 codes, is the first operand of mma.m16n8k16: lane 4g + t of a warp has rows g
and g + 8, and of each the words that it loaded itself. The order of a sum is free, so whatever codes lie in them are
its share, and x is loaded to match. A code becomes a float beside a power of two (2**k + code has the code in its low
bits); that and the zero point are taken off the sums, for which another product gives the sums of x.

Four lanes add up what is theirs, so their codes must share a scale. Where they do not, the eight columns of the second
operand are dealt out: x of a token stands in SPREAD columns, in each only at the lanes of one group, zero elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import codes, gl, gluon, launch_dependents, load_sides, load_words, pick_bytes, wait
from qcompile.kernels._tiles import activate, cdiv, constexpr, constexpr_function, dependent_launch, launch, stack
from qcompile.kernels._weight import Weight


def mma(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.MmaTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) that _gluon.can_read."""
    m, k = x.shape
    out = x.new_empty(m, weight.rows)
    launch(
        _mma,
        (cdiv(weight.rows, 16 * tile.tiles), cdiv(m, 8 // tile.spread * tile.columns)),
        x.view(torch.int32),
        *weight.pointers[:3],
        bias,
        out,
        m,
        weight.rows,
        k,
        *weight.strides,
        W=weight.layout,
        ACTIVATION=activation,
        SPREAD=tile.spread,
        WORDS=tile.words,
        TILES=tile.tiles,
        COLUMNS=tile.columns,
        AHEAD=tile.ahead,
        PDL=dependent_launch(x) and not weight.copied,
        num_warps=tile.warps,
    )
    return out


@gluon.jit
def _mma(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, SPREAD: gl.constexpr, WORDS: gl.constexpr, TILES: gl.constexpr,
    COLUMNS: gl.constexpr, AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    # A thread's four words, and its words of a chunk, where two lanes share one.
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    HALF: gl.constexpr = gl.BlockedLayout([1, WORDS], [32, 1], [WARPS, 1], [1, 0])
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    FIELDS: gl.constexpr = W.fields
    SHARING: gl.constexpr = W.sharing
    LANES: gl.constexpr = 4 // WORDS  # lanes of a chunk, and units that a product takes
    CHUNKS: gl.constexpr = WARPS * WORDS
    TOKENS: gl.constexpr = 8 // SPREAD
    OTHER: gl.constexpr = 4 if WORDS == 4 else 8  # words of x to the other eight inputs: of this unit or the next
    if PDL:
        launch_dependents()
    thread = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, L))
    lane, row = thread % 4, thread % 32 // 4
    chunk = (thread // 32 * 4 + lane) // LANES
    four = gl.arange(0, 4, layout=gl.SliceLayout(0, L))[None, :]
    loader = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, HALF))
    word = (loader % LANES * WORDS)[:, None] + gl.arange(0, WORDS, layout=gl.SliceLayout(0, HALF))[None, :]
    weights = (data_ptr, scale_ptr, zero_ptr, data_stride, scale_stride, zero_stride)
    n = gl.program_id(0) * (16 * TILES) + loader % 32 // 4
    loaded = (loader // 32 * 4 + loader % 4) // LANES
    ahead = ()
    for i in gl.static_range(AHEAD):
        ahead += (_load(weights, n, N, loaded + i * CHUNKS, word, K, W, TILES),)
    if PDL:
        wait()
    # The token of this lane's column, of the first columns.
    token = gl.program_id(1) * (TOKENS * COLUMNS) + row % TOKENS
    own = row // TOKENS == lane // (4 // SPREAD)
    nothing = gl.full([32 * WARPS, 4], 0.0, gl.float32, layout=L)
    ONE: gl.constexpr = 0x3F803F80 if DTYPE == gl.bfloat16 else 0x3C003C00  # noqa: SIM300
    ones = gl.full([32 * WARPS, 4], ONE, gl.int32, layout=L)
    sums = (nothing,) * (TILES * COLUMNS)
    for _ in range(0, K, CHUNKS * FIELDS * 16 * AHEAD):
        following = ()
        for i in gl.static_range(AHEAD):
            step = ahead[i]
            following += (_load(weights, n, N, loaded + (AHEAD + i) * CHUNKS, word, K, W, TILES),)
            for first in gl.static_range(0, FIELDS, SHARING):
                dots = (nothing,) * (TILES * COLUMNS)
                totals = (nothing,) * COLUMNS
                for unit in gl.static_range(first, first + SHARING, LANES):
                    k = ((chunk + i * CHUNKS) * FIELDS + unit) * 16 + thread % LANES * (4 * WORDS)
                    xs = ()
                    for c in gl.static_range(COLUMNS):
                        at = token + c * TOKENS
                        inside = own & (at < M)
                        x = (x_ptr + at.to(gl.int64) * (K // 2) + k // 2)[:, None] + four
                        xs += (gl.load(x, mask=(inside & (k < K))[:, None], other=0),)
                        xs += (gl.load(x + OTHER, mask=(inside & (k + 2 * OTHER < K))[:, None], other=0),)
                    new = ()
                    for t in gl.static_range(TILES):
                        a, b = _floats(step[t][0], unit, W, DTYPE, L), _floats(step[t][1], unit, W, DTYPE, L)
                        for c in gl.static_range(COLUMNS):
                            new += (_products(a, b, xs[2 * c], xs[2 * c + 1], dots[t * COLUMNS + c], DTYPE, WORDS),)
                    dots = new
                    new = ()
                    for c in gl.static_range(COLUMNS):
                        new += (
                            _products((ones, ones), (ones, ones), xs[2 * c], xs[2 * c + 1], totals[c], DTYPE, WORDS),
                        )
                    totals = new
                new = ()
                for t in gl.static_range(TILES):
                    scale = 1.0 if W.group == 0 else _of_rows(step[t][2], step[t][3], first // SHARING, four, L)
                    if zero_ptr is None:
                        zero = W.offset * 1.0
                    elif W.group == 0:
                        zero = _of_rows(
                            _side(zero_ptr, n, N, zero_stride, t), _side(zero_ptr, n + 8, N, zero_stride, t), 0, four, L
                        )
                    else:
                        zero = _of_rows(step[t][4], step[t][5], first // SHARING, four, L)
                    for c in gl.static_range(COLUMNS):
                        dot = dots[t * COLUMNS + c] - _beside(DTYPE, W.bits) * totals[c]
                        dot = dot * scale + zero * totals[c] if W.added else (dot - zero * totals[c]) * scale
                        new += (sums[t * COLUMNS + c] + dot,)
                sums = new
        ahead = following
        chunk += CHUNKS * AHEAD
        loaded += CHUNKS * AHEAD
    _store(sums, scale_ptr, bias_ptr, out_ptr, M, N, scale_stride, W, ACTIVATION, SPREAD, TILES, COLUMNS)


@gluon.jit
def _load(weights, n, N, chunk, word, K, W: gl.constexpr, TILES: gl.constexpr):
    """For every tile: the words of a lane's two rows, their scales, and their zero points."""
    data_ptr, scale_ptr, zero_ptr, data_stride, scale_stride, zero_stride = weights
    SHARING: gl.constexpr = W.sharing
    step = ()
    for t in gl.static_range(TILES):
        a = gl.minimum(n + 16 * t, N - 1).to(gl.int64)
        b = gl.minimum(n + 16 * t + 8, N - 1).to(gl.int64)
        words_a = load_words((data_ptr + a * (data_stride * 4))[:, None], chunk[:, None], word, K, W)
        words_b = load_words((data_ptr + b * (data_stride * 4))[:, None], chunk[:, None], word, K, W)
        scales_a = load_sides(scale_ptr + a * scale_stride, chunk, K, W, SHARING)
        scales_b = load_sides(scale_ptr + b * scale_stride, chunk, K, W, SHARING)
        zeros_a, zeros_b = (), ()
        if zero_ptr is not None:
            zeros_a = load_sides(zero_ptr + a * zero_stride, chunk, K, W, SHARING)
            zeros_b = load_sides(zero_ptr + b * zero_stride, chunk, K, W, SHARING)
        step += ((words_a, words_b, scales_a, scales_b, zeros_a, zeros_b),)
    return step


@gluon.jit
def _side(ptr, n, N, stride, TILE: gl.constexpr):
    return (gl.load(ptr + gl.minimum(n + 16 * TILE, N - 1).to(gl.int64) * stride),)


@gluon.jit
def _of_rows(a, b, INDEX: gl.constexpr, four, L: gl.constexpr):
    """Numbers of a lane's two rows as its sums lie: two of the first, two of the second."""
    ROWS: gl.constexpr = gl.SliceLayout(1, L)
    a = gl.convert_layout(a[INDEX].to(gl.float32), ROWS, assert_trivial=True)
    b = gl.convert_layout(b[INDEX].to(gl.float32), ROWS, assert_trivial=True)
    return gl.where(four < 2, a[:, None], b[:, None])


@gluon.jit
def _floats(words, UNIT: gl.constexpr, W: gl.constexpr, DTYPE: gl.constexpr, L: gl.constexpr):
    """A lane's codes of a unit, or its halves of two, in pairs of 16-bit floats: of the words' low and high bytes."""
    found = codes(words, UNIT, W)
    if found.shape[1] == 2:
        found = gl.reshape(gl.join(found, codes(words, UNIT + 1, W)), [found.shape[0], 4])
        found = gl.convert_layout(found, L, assert_trivial=True)
    if DTYPE == gl.float16:  # noqa: SIM300
        # 1024 + code, whose low byte is the code; float32 sums would feel the 1024.
        return _less_1024(pick_bytes(found, 0x64646464, 0x4140)), _less_1024(pick_bytes(found, 0x64646464, 0x4342))
    elif W.bits < 8:
        LOG: gl.constexpr = _log_beside(W.bits)
        found = found << (7 - LOG)
        HIGH: gl.constexpr = (127 + LOG) // 2 * 0x01010101
        return pick_bytes(found, HIGH, 0x4140), pick_bytes(found, HIGH, 0x4342)
    else:
        a, b = _exact(found, 0x7440), _exact(found, 0x7441)
        c, d = _exact(found, 0x7442), _exact(found, 0x7443)
        return pick_bytes(a, b, 0x7632), pick_bytes(c, d, 0x7632)


@constexpr_function
def _log_beside(bits):
    """k of the 2**k beside a code in bfloat16: odd, so that the byte with the code has no bit of the exponent."""
    return bits | 1


@constexpr_function
def _beside(dtype, bits):
    """What `_floats` leaves beside a code."""
    return float(1 << (bits | 1)) if dtype.is_bf16() and bits < 8 else 0.0


@gluon.jit
def _exact(found, SELECTOR: gl.constexpr):
    """The code of a byte as a float32, through 2**23 + code."""
    return (pick_bytes(found, 0x4B000000, SELECTOR).to(gl.float32, bitcast=True) - 8388608.0).to(gl.int32, bitcast=True)


@gluon.jit
def _less_1024(pair):
    return gl.inline_asm_elementwise("sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [pair, 0x64006400], gl.int32, True, 1)


@gluon.jit
def _products(a, b, x, other, sums, DTYPE: gl.constexpr, WORDS: gl.constexpr):
    """sums + four mma.m16n8k16, one for each word; a and b are the pairs of a lane's two rows.

    An element of x is two inputs; x and `other` are a lane's inputs in the order of its codes. The four elements of a
    thread reach the assembly in their order, which Triton keeps and does not promise: test_linear_mma.py would tell.
    """
    arguments = [a[0], b[0], a[1], b[1], x, other, sums]
    return gl.inline_asm_elementwise(_four_mma(DTYPE, WORDS), _REGISTERS, arguments, gl.float32, True, 4)


_REGISTERS = constexpr(",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 4))


@constexpr_function
def _four_mma(dtype, words):
    """$0 … $3 results, then four registers for each of the arguments above."""
    kind = "bf16" if dtype.is_bf16() else "f16"
    lines = [".reg .f32 s<4>;"]
    for index in range(4):
        # The words of two halves alternate: w0 of the first unit, w0 of the second, w1 of the first …
        w = index if words == 4 else (0, 2, 1, 3)[index]
        before = "{$28,$29,$30,$31}" if index == 0 else "{s0,s1,s2,s3}"
        after = "{$0,$1,$2,$3}" if index == 3 else "{s0,s1,s2,s3}"
        first, second = f"{{${4 + w},${8 + w},${12 + w},${16 + w}}}", f"{{${20 + 2 * index},${21 + 2 * index}}}"
        lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {after}, {first}, {second}, {before};")
    return "{ " + " ".join(lines) + " }"


@gluon.jit
def _store(
    sums, scale_ptr, bias_ptr, out_ptr, M, N, scale_stride,
    W: gl.constexpr, ACTIVATION: gl.constexpr, SPREAD: gl.constexpr, TILES: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Add up what warps and spread columns have, and write it. Lane 4g + t has rows g, g + 8 of columns 2t, 2t + 1."""
    WARPS: gl.constexpr = gl.num_warps()
    COUNT: gl.constexpr = TILES * COLUMNS
    LANES: gl.constexpr = 4 // SPREAD
    parts = gl.reshape(stack(sums, COUNT), [WARPS, 8, SPREAD, LANES, 2, 2 * COUNT])
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    y = gl.convert_layout(gl.reshape(gl.sum(gl.sum(parts, 0), 1), [32 * LANES * COUNT]), FLAT)
    index = gl.arange(0, 32 * LANES * COUNT, layout=FLAT)
    tile, column, element = index % COUNT // COLUMNS, index % COLUMNS, index // COUNT
    n = (gl.program_id(0) * TILES + tile) * 16 + element // 2 % 2 * 8 + element // (4 * LANES)
    m = (gl.program_id(1) * COLUMNS + column) * (8 // SPREAD) + element // 4 % LANES * 2 + element % 2
    inside = (n < N) & (m < M)
    if W.group == 0:
        y *= gl.load(scale_ptr + n.to(gl.int64) * scale_stride, mask=inside, other=0).to(gl.float32)
    if bias_ptr is not None:
        y += gl.load(bias_ptr + n, mask=inside, other=0).to(gl.float32)
    y = activate(y, ACTIVATION).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + m.to(gl.int64) * N + n, y, mask=inside)
