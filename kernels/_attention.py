"""Pieces that the attention kernels share: masks, and the sums over keys.

Tensors may have a first axis of BESIDE warps, each with its own sums over a share of a block of keys.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._tiles import (
    INTERPRET,
    constexpr,
    fetch,
    tl,
    triton,
)

SCAN_ELEMENTS = 1024
# Steps, a power of two, whose keys and values are on their way to the L2 cache before the wait for the kernel ahead.
# NOTE: batch 1, a mask over 32768 keys, H100: 52.3 µs with none, 50.8 with 2, 49.7 with 4, 51.2 with 8; over 8192 keys
# 18.3, 17.1, 17.2 and 17.0. A layer of Llama-3-8B at batch 16 over 513 keys: 97.8 with none, 97.2 with 4.
FETCHED = 4
HAS_ASM = constexpr(not INTERPRET)


def mask_strides(mask: Tensor | None, *shape: int) -> list[int]:
    """Those of a mask for queries and keys of this shape; 0 where all share it, also where there is one alone."""
    if mask is None:
        return [0] * len(shape)
    mask = mask.expand(shape)
    return [stride if size > 1 else 0 for size, stride in zip(shape, mask.stride())]


@triton.jit
def is_attended(mask):
    return mask if mask.dtype == tl.int1 else mask.to(tl.float32) != float("-inf")


@triton.jit
def seen_steps(
    mask_ptr, mask_column, rows, part, splits, steps, keys,
    BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, SCAN: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """Of this program's steps the first one in which anyone attends, the one behind the last, and the key behind the
    last."""
    lowest = tl.zeros((MASK_ROWS, SCAN), tl.int32) + keys
    highest = tl.zeros((MASK_ROWS, SCAN), tl.int32)
    for start in range(0, steps * BLOCK_N, SCAN):
        i = start + tl.arange(0, SCAN)[None, :]
        n = (i // BLOCK_N * splits + part) * BLOCK_N + i % BLOCK_N
        inside = rows & (n < keys)
        mask = tl.load(mask_ptr + n.to(tl.int64) * mask_column, mask=inside, cache_modifier=CACHED)
        attended = is_attended(mask) & inside
        lowest = tl.where(attended, tl.minimum(lowest, n), lowest)
        highest = tl.where(attended, tl.maximum(highest, n + 1), highest)
    # One exchange between warps for both.
    ends = tl.max(tl.reshape(tl.join(keys - lowest, highest), (MASK_ROWS * SCAN, 2)), 0)
    before, end = tl.split(ends)
    return (keys - before) // (BLOCK_N * splits), tl.cdiv(tl.cdiv(end, BLOCK_N) - part, splits), end


@triton.jit
def fetch_ahead(
    k_ptr, v_ptr, mask_ptr, part, splits, keys, k_row, k_column, v_row, v_column, mask_column, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Begin to bring keys and values of this program's first steps to the L2 cache, those that are attended to by the
    mask as it is by now: the kernel before may have yet to write it."""
    i = tl.arange(0, STEPS * BLOCK_N)[:, None]
    n = (i // BLOCK_N * splits + part) * BLOCK_N + i % BLOCK_N
    wanted = n < keys
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + n.to(tl.int64) * mask_column, mask=wanted, cache_modifier=".cg")
        wanted = is_attended(mask) & wanted
    _fetch(k_ptr, n, k_row, k_column, wanted, D, BLOCK_D)
    _fetch(v_ptr, n, v_row, v_column, wanted, DV, BLOCK_DV)


@triton.jit
def _fetch(ptr, n, row, column, wanted, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows n of a cache that are wanted; BLOCK is a power of two from WIDTH."""
    LINE: tl.constexpr = 128 // (ptr.dtype.element_ty.primitive_bitwidth // 8)
    d = tl.arange(0, (BLOCK + LINE - 1) // LINE)[None, :] * LINE
    at = (ptr + n.to(tl.int64) * row + tl.minimum(d, WIDTH - 1) * column).to(tl.int64)
    fetch(at, wanted & (d < WIDTH))


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap)"""
    x = logits / softcap
    part = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, -softcap, softcap) * ((1 - part) / (1 + part))


@triton.jit
def add_product(a, b, c):
    """a @ b + c in float32; c may be None. Tensor cores take 16 rows or more; fewer are multiplied one by one."""
    if a.shape[len(a.shape) - 2] >= 16:
        rounded = a.to(b.dtype)
        c = tl.dot(rounded, b, c, input_precision="ieee")
        if a.dtype != b.dtype:  # what rounding took away counts as well
            c = tl.dot((a - rounded.to(a.dtype)).to(b.dtype), b, c, input_precision="ieee")
        return c
    else:
        y = tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
        return y if c is None else y + c


@triton.jit
def weigh(logits, top, total):
    """Of one step: the weights of its keys, by what to shrink what was summed before, and the new top and total."""
    LAST: tl.constexpr = len(logits.shape) - 1
    new_top = tl.maximum(top, tl.max(logits, LAST, keep_dims=True))
    # While nothing is attended the top is -inf, and -inf less -inf is no number.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp(logits - base)
    shrink = tl.exp(top - base)
    return p, shrink, new_top, total * shrink + tl.sum(p, LAST, keep_dims=True)


@triton.jit
def beside(x, BESIDE: tl.constexpr):
    """The same (rows, columns) for each of the warps side by side."""
    if BESIDE > 1:
        x = tl.broadcast_to(x[None, :, :], (BESIDE, x.shape[0], x.shape[1]))
    return x


@triton.jit
def key_places(BLOCK_N: tl.constexpr, BESIDE: tl.constexpr):
    """Places of a block of keys, in rows and in columns; where warps are side by side, each one's."""
    if BESIDE > 1:
        SHARE: tl.constexpr = BLOCK_N // BESIDE
        place = tl.arange(0, BESIDE)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
        return place[:, :, None], place[:, None, :]
    else:
        place = tl.arange(0, BLOCK_N)
        return place[:, None], place[None, :]


@triton.jit
def turned_keys(k):
    if len(k.shape) == 3:
        return tl.trans(k, 0, 2, 1)
    else:
        return tl.trans(k)


@triton.jit
def mask_at(mask_ptr, n, mask_column, inside):
    """The mask of keys `inside`; where there is none all are attended to."""
    if mask_ptr is None:
        return tl.full((1, 1), 1, tl.int1)
    else:
        return tl.load(mask_ptr + n.to(tl.int64) * mask_column, mask=inside)


@triton.jit
def attended_in(mask_ptr, n, mask_column, keys):
    """Which keys n are attended to, to read these alone; there is one key at least."""
    at = mask_ptr + tl.minimum(n, keys - 1).to(tl.int64) * mask_column
    if HAS_ASM and mask_ptr.dtype.element_ty == tl.int1:
        # In assembly: keys whose read depends on a load of bytes that Triton knows would be laid out as bytes for dots.
        mask = tl.inline_asm_elementwise(
            "{ .reg .u16 byte; ld.global.u8 byte, [$1]; cvt.u32.u16 $0, byte; }",
            "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return (mask != 0) & (n < keys)
    else:
        return is_attended(tl.load(at)) & (n < keys)


@triton.jit
def masked(logits, mask, inside, softcap):
    """Logits as the cap and the mask leave them."""
    if softcap is not None:
        logits = capped(logits, softcap)
    if mask.dtype != tl.int1:
        logits += mask.to(tl.float32)
    return tl.where(inside & is_attended(mask), logits, float("-inf"))


@triton.jit
def together(y, top, total):
    """What warps side by side have found, as one."""
    if len(y.shape) == 3:
        highest = tl.max(top, 0)
        weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
        y, top, total = _sum_of(y * weight), highest, tl.sum(total * weight, 0)
    return y, top, total


@triton.jit
def _sum_of(y):
    """The sum over the first axis. A split brings what is added to one thread; a reduction exchanges all of it."""
    COUNT: tl.constexpr = y.shape[0]
    halves = tl.reshape(y, (2, COUNT // 2, y.shape[1], y.shape[2]))
    a, b = tl.split(tl.permute(halves, (1, 2, 3, 0)))
    if COUNT > 2:
        return _sum_of(a + b)
    else:
        return tl.reshape(a + b, (y.shape[1], y.shape[2]))
