"""Pieces that the Triton kernels share: reading packed codes, activations, and how a launch is prepared.

Codes are read as int32 words. A *unit* is sixteen neighbouring codes; in *byte form* it is four words with one whole
code in each byte, whatever the planes. The smallest plane has FIELDS units in a chunk of 16 bytes, so kernels step over
chunks of that plane: unit = chunk * FIELDS + field, and word `w` of a unit holds its codes 4w … 4w + 3.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import constexpr_function
    from triton.language import constexpr
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # the modules still import, and every kernel refuses
    triton = SimpleNamespace(jit=lambda function=None, **_: function or triton.jit)
    tl = gdc_launch_dependents = gdc_wait = None
    constexpr = constexpr_function = triton.jit

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Arguments that change from call to call, as numbers of rows do. Whether sixteen divides them makes no kernel of its
# own: at the first prompt of 112 tokens six of Llama's took four seconds to compile, in the middle of a chat.
COUNTS = ("M", "rows", "length", "batch", "room", "top_k", "x_inner", "r_inner", "g_inner", "u_inner")
COUNTS += ("survey_batch", "survey_head", "end_count")
launched = triton.jit(do_not_specialize_on_alignment=COUNTS)  # in place of triton.jit, for a kernel that is launched


def refuses_place(x: Tensor, name: str = "x") -> str | None:
    if tl is None:
        return "triton is not installed"
    if x.device.type != "cuda" and not (INTERPRET and x.device.type == "cpu"):
        return f"needs cuda, {name} is on {x.device.type}"
    return None


def refuses_device(x: Tensor, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel runs where `x` is, in `dtype`; the interpreter takes the CPU, but gets bfloat16 wrong."""
    if reason := refuses_place(x):
        return reason
    if dtype not in FLOATS:
        return f"handles float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16 and (INTERPRET or torch.cuda.get_device_capability(x.device) < (8, 0)):
        return "bfloat16 needs a GPU of compute capability 8.0"
    return None


def dependent_launch(x: Tensor) -> bool:
    """Can a kernel start while the one before it drains? (Hopper and later; saves half a microsecond a kernel.)"""
    return not INTERPRET and torch.cuda.get_device_capability(x.device) >= (9, 0)


def launch(kernel, grid: Sequence[int], *args, **constants) -> None:
    """Run `kernel` where its first argument is. PDL, in kernels that have it, also sets the launch attribute."""
    if INTERPRET:
        kernel[tuple(grid)](*args, **constants)
        return
    with torch.cuda.device(args[0].device):
        kernel[tuple(grid)](*args, **constants, launch_pdl=constants.get("PDL", False))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def as_rows(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """(x, rows, inner, outer_stride, inner_stride) of x (…, n) seen as rows of n neighbouring elements.

    Row r begins at r // inner * outer_stride + r % inner * inner_stride. Leading dimensions are merged where their
    strides allow it; x is copied only if more than two remain or the last one is strided.
    """
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return as_rows(x.contiguous())
    (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(dims)) + dims
    return x, outer * inner, inner, outer_stride, inner_stride


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where a row of `as_rows` begins."""
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def fetch(place, wanted):
    """Begin to bring the 128 bytes around each place, an int64 tensor, to the L2 cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r", [place, wanted.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def plane_words(K, WIDTH: tl.constexpr):
    """int32 words of one row of a plane of WIDTH bits."""
    return (K + 128 // WIDTH - 1) // (128 // WIDTH) * 4


@triton.jit
def _plane(row, chunk, word, mask, FIELD: tl.constexpr, FIELDS: tl.constexpr, WIDTH: tl.constexpr):
    """One plane of unit chunk * FIELDS + FIELD, in byte form. `row` points at the plane's first word."""
    PER_CHUNK: tl.constexpr = 8 // WIDTH
    at = (chunk * (FIELDS // PER_CHUNK) + FIELD // PER_CHUNK) * 4 + word
    words = tl.load(row + at, mask=mask, eviction_policy="evict_first")
    if WIDTH < 8:
        words = (words >> (FIELD % PER_CHUNK * WIDTH)) & (0x01010101 * ((1 << WIDTH) - 1))
    return words


@triton.jit
def unit_codes(row, K, chunk, word, mask, FIELD: tl.constexpr, W: tl.constexpr):
    """Unit chunk * fields + FIELD in byte form, of a weight of layout W (see _weight.py).

    Planes that hold several units of the step in one chunk are loaded once: equal loads are merged by the compiler.
    """
    codes = _plane(row, chunk, word, mask, FIELD, W.fields, W.p0)
    if W.p1 > 0:
        row += plane_words(K, W.p0)
        codes |= _plane(row, chunk, word, mask, FIELD, W.fields, W.p1) << W.p0
    if W.p2 > 0:
        row += plane_words(K, W.p1)
        codes |= _plane(row, chunk, word, mask, FIELD, W.fields, W.p2) << (W.p0 + W.p1)
    return codes


@triton.jit
def byte_value(words, table_ptr, BYTE: tl.constexpr, W: tl.constexpr):
    """The number of the code in byte BYTE, times a power of two that `scaled_for_byte` knows.

    An integer's bits are read as a denormal float32, those of a small float as a float32 with a tiny exponent. FMA
    takes denormals at full speed, so either costs a few logic operations; a conversion runs at a fraction of that rate.
    """
    BITS: tl.constexpr = W.bits
    if W.table:
        return tl.load(table_ptr + ((words >> (8 * BYTE)) & ((1 << BITS) - 1)))
    elif W.exponent > 0:
        PLACE: tl.constexpr = 23 - W.mantissa
        magnitude = words >> (8 * BYTE - PLACE) if 8 * BYTE > PLACE else words << (PLACE - 8 * BYTE)
        magnitude &= ((1 << (BITS - 1)) - 1) << PLACE
        value = magnitude | (words << (32 - BITS - 8 * BYTE)) & -0x80000000
        if W.special > 0:
            value |= tl.where(magnitude >= W.special << PLACE, 0x7F800000, 0)
        return value.to(tl.float32, bitcast=True)
    else:
        SHIFT: tl.constexpr = _shift(BYTE, BITS)
        placed = words >> (8 * BYTE - SHIFT) if 8 * BYTE > SHIFT else words
        return (placed & (((1 << BITS) - 1) << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def scaled_for_byte(x, BYTE: tl.constexpr, W: tl.constexpr):
    """The factor for `byte_value`: float32 x, scaled so that the product is 2**-74 times the true one."""
    if W.table:
        return x
    elif W.exponent > 0:
        return x * (2.0 ** (127 - W.bias - 74))
    else:
        return x * (2.0 ** (75 - _shift(BYTE, W.bits)))


@constexpr_function
def _shift(byte: int, bits: int) -> int:
    """Where the code of a byte lies among the 23 bits of a mantissa; moved only if it is not inside them."""
    return 8 * byte if 8 * byte + bits <= 23 else 8 * ((23 - bits) // 8)


@triton.jit
def unit_weights(
    data, scale_row, zero_row, table_ptr, K, chunk,
    DTYPE: tl.constexpr, FIELD: tl.constexpr, W: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The weights of unit chunk * fields + FIELD as a (rows, 16 * chunks) tile of DTYPE; rounded once.

    data, scale_row and zero_row point at the rows, (rows, 1); `chunk` is a vector. The scale of a whole row is left out
    unless SCALED.
    """
    # The first of the units that surely share a scale with this one: the loads of their scales are then equal.
    FIRST: tl.constexpr = FIELD // W.sharing * W.sharing
    word = tl.arange(0, 4)[None, None, :]
    mask = None if EVEN else ((chunk * W.fields + FIELD) * 16 < K)[None, :, None]
    codes = unit_codes(data[:, :, None], K, chunk[None, :, None], word, mask, FIELD, W)
    if W.group == 0:
        scale = tl.load(scale_row).to(tl.float32)[:, :, None] if SCALED else 1.0
        zero = W.offset * 1.0 if zero_row is None else tl.load(zero_row).to(tl.float32)[:, :, None]
    else:
        group = tl.minimum((chunk * W.fields + FIRST) * 16, K - 1) // W.group
        scale = tl.load(scale_row + group[None, :]).to(tl.float32)[:, :, None]
        zero = W.offset * 1.0 if zero_row is None else tl.load(zero_row + group[None, :]).to(tl.float32)[:, :, None]
    added = zero if W.added else -zero * scale
    parts = ()
    for byte in tl.static_range(4):
        code = scaled_for_byte(byte_value(codes, table_ptr, byte, W), byte, W)
        parts += (tl.fma(*tl.broadcast(code, scale * 2.0**74), added + tl.zeros_like(code)),)
    # Rounded last: Triton 3.6 fails to compile a reshape right before tl.dot for sm_90 and sm_100.
    return tl.reshape(stack(parts, 4), (codes.shape[0], codes.shape[1] * 16)).to(DTYPE)


@triton.jit
def stack(tensors, COUNT: tl.constexpr):
    """COUNT tensors of one shape, a power of two, side by side along a new last axis of COUNT.

    One reduction over the result costs one exchange between warps, where COUNT reductions cost COUNT.
    """
    if COUNT > 1:
        joined = ()
        for i in tl.static_range(COUNT // 2):
            joined += (tl.join(tensors[i], tensors[i + COUNT // 2]),)
        return stack(joined, COUNT // 2)
    else:
        return tensors[0]


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activations of ops/activation.py on float32; None is the identity."""
    if ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "quick_gelu":
        y = y * tl.sigmoid(1.702 * y)
    elif ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)
    elif ACTIVATION == "relu2":
        y = tl.where(y < 0, 0.0, y * y)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(y)
    elif ACTIVATION == "tanh":
        # Near zero 2 * sigmoid(2y) - 1 cancels; the series is exact to float32 there.
        square = y * y
        series = y * (1 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
        y = tl.where(square < 0.01, series, 2 * tl.sigmoid(2 * y) - 1)
    else:
        tl.static_assert(ACTIVATION is None, "unknown activation")
    return y
