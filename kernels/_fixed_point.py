"""Inputs in 16-bit fixed point, and their products with codes by DP2A: two of them with two codes at once, exactly."""

from __future__ import annotations

from qcompile.kernels._gluon import gl, gluon, pick_bytes
from qcompile.kernels._tiles import constexpr_function


@gluon.jit
def read_inputs(x_row, chunk, word, K, UNITS: gl.constexpr):
    """What the inputs of a chunk meet, four of 16 bits in a word, unit by unit."""
    found = ()
    for unit in gl.static_range(UNITS):
        at = gl.expand_dims((chunk * UNITS + unit) * 16, 2)
        found += (gl.load(x_row + (at // 4 + word), mask=at < K, other=0),)
    return found


@gluon.jit
def fixed_point(
    x, weights, DTYPE: gl.constexpr, NORM: gl.constexpr, OFFSET: gl.constexpr, UNITS: gl.constexpr,
    FALLING: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Inputs, times the norm's weights, in fixed point: (two words for four of them, what one is worth, their sum); and
    the sum of their squares. Falling, one of each next unit is worth twice as much."""
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
        if FALLING and unit > 0:
            scale *= 0.5
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
def dp2a(a, b, found, dot):
    """dot + the 16-bit numbers of a and b times the bytes of `found`, summed over the words of a thread: the first is
    the sum, the others are zeros."""
    WORDS: gl.constexpr = found.shape[2]
    return gl.inline_asm_elementwise(
        _dp2a_asm(WORDS), _dp2a_registers(WORDS), [a, b, found, dot], gl.int32, True, WORDS
    )


@constexpr_function
def _dp2a_registers(words):
    return ",".join(["=r"] * words + ["r"] * 4 * words)


@constexpr_function
def _dp2a_asm(words):
    text = f"{{ .reg .s32 t; mov.b32 t, ${4 * words};"
    for word in range(words):
        a, b, found = (words * operand + word for operand in (1, 2, 3))
        text += f" dp2a.lo.s32.u32 t, ${a}, ${found}, t; dp2a.hi.s32.u32 t, ${b}, ${found}, t;"
    return text + " mov.b32 $0, t;" + "".join(f" mov.b32 ${word}, 0;" for word in range(1, words)) + " }"
