"""Attention of few query rows, as in decoding: `_split` over parts of the keys, and `_combine` of what they found.

One program of `_split` takes the query rows of all heads that share a key/value head, so that keys and values are read
once, and every parts-th block of keys, so that a cache filled halfway is work for all. It reads its part of the mask
first and goes from the first block in which anyone attends to the last such key. (Dao et al. 2023, flash-decoding.)
Of few rows each warp takes its share of a block and keeps its own sums, so that warps wait for one another at the end
alone: such tensors have a first axis of BESIDE warps more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._tiles import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    power_of_two,
    refuses_device,
    tl,
    triton,
)
from qcompile.ops.attention import attention
from qcompile.ops.registry import known, opaque

MAX_LENGTH = 8
MAX_WIDTH = 256
SCAN_ELEMENTS = 1024


def refuses(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    if key_scale is not None or value_scale is not None:
        return "handles numbers, not codes"
    for tensor in (query, key, value):
        if reason := refuses_device(tensor, tensor.dtype):
            return reason
        if tensor.dtype != query.dtype:
            return "query, key and value differ in dtype"
    return refuses_shape(query, value, is_causal)


def refuses_shape(query: Tensor, value: Tensor, is_causal: bool) -> str | None:
    length, width, value_width = (known(size) for size in (query.shape[2], query.shape[3], value.shape[3]))
    if length is None or length > MAX_LENGTH:
        return f"handles up to {MAX_LENGTH} query rows, not {query.shape[2]}"
    if width is None or value_width is None or max(width, value_width) > MAX_WIDTH:
        return f"handles heads of up to {MAX_WIDTH} columns, not {query.shape[3]} and {value.shape[3]}"
    if is_causal:
        return "handles a mask, not is_causal"
    return None


@opaque(lambda query, key, value, *others: query.new_empty(*query.shape[:3], value.shape[3]))
def attention_decode_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    return attend(query, key, value, mask, scale, softcap=softcap)


@attention.implementation("triton_decode", refuses)
def attention_decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return attention_decode_cuda(query, key, value, mask, scale, softcap)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float,
    tile: _tuning.AttentionTile | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The op without is_causal, by the tile that is given or else chosen."""
    batch, heads, length, width = query.shape
    kv_heads, keys, value_width = *key.shape[1:3], value.shape[3]
    out = query.new_empty(batch, heads, length, value_width)
    if out.numel() == 0:
        return out
    if query.stride(3) != 1:
        query = query.contiguous()
    rows = heads // kv_heads * length
    block_d, block_dv = (max(16, power_of_two(n)) for n in (width, value_width))
    if tile is None:
        device = _tuning.Device.of(key.device)
        tile = _tuning.attention_tile(batch * kv_heads, rows, keys, max(block_d, block_dv), key.itemsize, device)
    mask_strides, mask_rows = [0, 0, 0, 0], 1
    if mask is not None:
        mask_strides = list(mask.expand(batch, heads, length, keys).stride())
        mask_rows = tile.rows if any(mask_strides[1:3]) else 1
    sums = parts = None
    if tile.splits > 1:
        sums, parts = partial_results(query, batch * heads * length, tile.splits, value_width)
    launch(
        _split,
        (batch * kv_heads, tile.splits, cdiv(rows, tile.rows)),
        query,
        key,
        value,
        mask,
        out,
        sums,
        parts,
        kv_heads,
        rows,
        length,
        keys,
        scale,
        softcap,
        *query.stride()[:3],
        *key.stride(),
        *value.stride(),
        *mask_strides,
        D=width,
        DV=value_width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BESIDE=tile.beside,
        MASK_ROWS=mask_rows,
        SCAN=max(16, SCAN_ELEMENTS // mask_rows),
        EARLY=lets_start(tile, batch * kv_heads, keys, _tuning.Device.of(key.device)),
        PDL=dependent_launch(query),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if sums is not None and parts is not None:
        combine(sums, parts, out)
    return out


def lets_start(tile: _tuning.AttentionTile, pairs: int, keys: int, device: _tuning.Device) -> bool:
    """May the next kernel start when this one does? Its programs, which wait, take room and bandwidth from this one's;
    those of `_combine` take little.

    NOTE: a layer of Llama-3-8B, H100: with `_combine`, at batch 1, 60.9 µs, 63.9 if it starts when the keys are read;
    without it, at batch 16, 101.3 and 98.4.
    """
    small = tile.splits > 1 and pairs * tile.splits <= device.processors
    return small or cdiv(keys, tile.keys * tile.splits) <= 2


def partial_results(like: Tensor, rows: int, splits: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where programs leave what they found in their parts: top and total, and the weighted sums of the values."""
    sums = like.new_empty(rows, 2, splits, dtype=torch.float32)
    return sums, like.new_empty(rows, splits, columns, dtype=torch.float32)


def combine(sums: Tensor, parts: Tensor, out: Tensor) -> None:
    """Write to `out`, rows of columns one after the other, what all parts together give."""
    rows, splits, columns = parts.shape
    block_dv = max(16, power_of_two(columns))
    launch(
        _combine,
        (rows,),
        sums,
        parts,
        out,
        DV=columns,
        BLOCK_DV=block_dv,
        SPLITS=splits,
        PDL=dependent_launch(out),
        num_warps=max(1, min(8, splits * block_dv // 512)),
    )


@triton.jit
def _attended(mask):
    return mask if mask.dtype == tl.int1 else mask.to(tl.float32) != float("-inf")


@triton.jit
def _seen_steps(
    mask_ptr, mask_column, rows, steps, keys,
    BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, SCAN: tl.constexpr, CACHED: tl.constexpr,
):  # fmt: skip
    """Of this program's steps the first one in which anyone attends, the one behind the last, and the key behind the
    last."""
    part, splits = tl.program_id(1), tl.num_programs(1)
    lowest = tl.zeros((MASK_ROWS, SCAN), tl.int32) + keys
    highest = tl.zeros((MASK_ROWS, SCAN), tl.int32)
    for start in range(0, steps * BLOCK_N, SCAN):
        i = start + tl.arange(0, SCAN)[None, :]
        n = (i // BLOCK_N * splits + part) * BLOCK_N + i % BLOCK_N
        inside = rows & (n < keys)
        mask = tl.load(mask_ptr + n.to(tl.int64) * mask_column, mask=inside, cache_modifier=CACHED)
        attended = _attended(mask) & inside
        lowest = tl.where(attended, tl.minimum(lowest, n), lowest)
        highest = tl.where(attended, tl.maximum(highest, n + 1), highest)
    # One exchange between warps for both.
    ends = tl.max(tl.reshape(tl.join(keys - lowest, highest), (MASK_ROWS * SCAN, 2)), 0)
    before, end = tl.split(ends)
    return (keys - before) // (BLOCK_N * splits), tl.cdiv(tl.cdiv(end, BLOCK_N) - part, splits), end


@triton.jit
def _capped(logits, softcap):
    """softcap * tanh(logits / softcap)"""
    x = logits / softcap
    part = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, -softcap, softcap) * ((1 - part) / (1 + part))


@triton.jit
def _product(a, b, c):
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
def _weights(logits, top, total):
    """Of one step: the weights of its keys, by what to shrink what was summed before, and the new top and total."""
    LAST: tl.constexpr = len(logits.shape) - 1
    new_top = tl.maximum(top, tl.max(logits, LAST, keep_dims=True))
    # While nothing is attended the top is -inf, and -inf less -inf is no number.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp(logits - base)
    shrink = tl.exp(top - base)
    return p, shrink, new_top, total * shrink + tl.sum(p, LAST, keep_dims=True)


@triton.jit
def _beside(x, BESIDE: tl.constexpr):
    """The same (rows, columns) for each of the warps side by side."""
    if BESIDE > 1:
        x = tl.broadcast_to(x[None, :, :], (BESIDE, x.shape[0], x.shape[1]))
    return x


@triton.jit
def _places(BLOCK_N: tl.constexpr, BESIDE: tl.constexpr):
    """Places of a block of keys, in rows and in columns; where warps are side by side, each one's."""
    if BESIDE > 1:
        SHARE: tl.constexpr = BLOCK_N // BESIDE
        place = tl.arange(0, BESIDE)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
        return place[:, :, None], place[:, None, :]
    else:
        place = tl.arange(0, BLOCK_N)
        return place[:, None], place[None, :]


@triton.jit
def _turned(k):
    if len(k.shape) == 3:
        return tl.trans(k, 0, 2, 1)
    else:
        return tl.trans(k)


@triton.jit
def _mask_at(mask_ptr, n, mask_column, inside):
    """The mask of keys `inside`; where there is none all are attended to."""
    if mask_ptr is None:
        return tl.full((1, 1), 1, tl.int1)
    else:
        return tl.load(mask_ptr + n.to(tl.int64) * mask_column, mask=inside)


@triton.jit
def _masked(logits, mask, inside, softcap):
    """Logits as the cap and the mask leave them."""
    if softcap is not None:
        logits = _capped(logits, softcap)
    if mask.dtype != tl.int1:
        logits += mask.to(tl.float32)
    return tl.where(inside & _attended(mask), logits, float("-inf"))


@triton.jit
def _together(y, top, total):
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


@triton.jit
def _leave(y, top, total, out_ptr, sums_ptr, parts_ptr, result, inside, dv, DV: tl.constexpr):
    """Store the rows that are `inside` as rows of the result, or where there are parts what `_combine` makes it of."""
    part, splits = tl.program_id(1), tl.num_programs(1)
    if parts_ptr is None:
        # Rows that attend to nothing are zeros.
        y /= tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + result * DV + dv, y.to(out_ptr.dtype.element_ty), mask=inside & (dv < DV))
    else:
        tl.store(sums_ptr + result * 2 * splits + part, top, mask=inside)
        tl.store(sums_ptr + (result * 2 + 1) * splits + part, total, mask=inside)
        tl.store(parts_ptr + (result * splits + part) * DV + dv, y, mask=inside & (dv < DV))


@triton.jit
def _split(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr, kv_heads, rows, length, keys, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BESIDE: tl.constexpr, MASK_ROWS: tl.constexpr, SCAN: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    part, splits = tl.program_id(1), tl.num_programs(1)
    # Row r is query position r % length of head r // length of the group.
    first_row = tl.program_id(2) * BLOCK_M
    row = (first_row + tl.arange(0, BLOCK_M))[:, None]
    head = kv_head * (rows // length) + row // length
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    q_at = batch * q_batch + head * q_head + (row % length).to(tl.int64) * q_row
    q = tl.load(q_ptr + q_at + d, mask=(row < rows) & (d < D), other=0.0)
    q = _beside(q, BESIDE)
    # Step s of this program is block s * splits + part.
    first, end, limit = 0, tl.cdiv(tl.cdiv(keys, BLOCK_N) - part, splits), keys
    seen_row = (first_row + tl.arange(0, MASK_ROWS))[:, None]
    if mask_ptr is not None:
        seen_head = kv_head * (rows // length) + seen_row // length
        mask_ptr += batch * mask_batch + seen_head * mask_head + (seen_row % length).to(tl.int64) * mask_row
        first, end, limit = _seen_steps(mask_ptr, mask_column, seen_row < rows, end, keys, BLOCK_N, MASK_ROWS, SCAN, "")
    k_ptr += batch * k_batch + kv_head * k_head + d * k_column
    v_ptr += batch * v_batch + kv_head * v_head + dv * v_column
    down, across = _places(BLOCK_N, BESIDE)
    top = _beside(tl.full((BLOCK_M, 1), float("-inf"), tl.float32), BESIDE)
    total = _beside(tl.zeros((BLOCK_M, 1), tl.float32), BESIDE)
    y = _beside(tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), BESIDE)
    n = (first * splits + part) * BLOCK_N + across
    inside = (n < limit) & (seen_row < rows)
    mask = _mask_at(mask_ptr, n, mask_column, inside)
    # From zero: Triton 3.9 loses sight of the alignment of loads in a loop that begins at a reduction's result.
    for step in range(0, end - first):  # type: ignore[operator]
        start = ((first + step) * splits + part) * BLOCK_N  # type: ignore[operator]
        k_at, v_at = k_ptr + start.to(tl.int64) * k_row, v_ptr + start.to(tl.int64) * v_row
        k = tl.load(k_at + down * k_row, mask=(start + down < limit) & (d < D), other=0.0)
        v = tl.load(v_at + down * v_row, mask=(start + down < limit) & (dv < DV), other=0.0)
        logits = _masked(_product(q, _turned(k), None) * scale, mask, inside, softcap)
        p, shrink, top, total = _weights(logits, top, total)
        y = _product(p, v, y * shrink)
        n += splits * BLOCK_N
        inside = (n < limit) & (seen_row < rows)
        mask = _mask_at(mask_ptr, n, mask_column, inside)  # the next step's, which nothing waits for here
    if PDL and not EARLY:
        gdc_launch_dependents()  # not earlier: waiting programs would take room from those that read
    y, top, total = _together(y, top, total)
    _leave(y, top, total, out_ptr, sums_ptr, parts_ptr, pair * rows + row, row < rows, dv, DV)


@triton.jit
def _combine(
    sums_ptr, parts_ptr, out_ptr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):
    """One program makes one row of the result."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)[:, None]
    column = tl.arange(0, BLOCK_DV)[None, :]
    top = tl.load(sums_ptr + row * 2 * SPLITS + part)
    total = tl.load(sums_ptr + (row * 2 + 1) * SPLITS + part)
    y = tl.load(parts_ptr + (row * SPLITS + part) * DV + column, mask=column < DV, other=0.0)
    highest = tl.max(top, 0, keep_dims=True)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(total * weight, 0)
    y = tl.sum(y * weight, 0) / tl.where(whole == 0.0, 1.0, whole)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + row * DV + column, y.to(DTYPE), mask=column < DV)
