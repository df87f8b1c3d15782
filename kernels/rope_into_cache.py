"""Rotary embedding of queries and keys, and the writing of keys and values to a cache, in one launch.

One program takes a few positions of one head: of the queries, of the keys or of the values.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._row_codes import SMALLEST, refuses_codes
from qcompile.kernels._tiles import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    refuses_device,
    tl,
    triton,
)
from qcompile.ops.registry import known, opaque
from qcompile.ops.rope import rope_into_cache

BLOCK_ELEMENTS = 512
# Of a prompt of 2048 tokens Inductor's kernels take two thirds of this one's time.
MAX_LENGTH = 8
WRITES = ("keys", "values")


def refuses(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None, fixed: bool = False,
) -> str | None:  # fmt: skip
    if fixed:
        return "makes scales of its own"
    for tensor in (query, key, value, cos, sin, *((keys, values) if key_scales is None else ())):
        if reason := refuses_device(tensor, tensor.dtype):
            return reason
    for codes, scales in ((keys, key_scales), (values, value_scales)):
        if scales is not None and (reason := refuses_codes(codes, scales)):
            return reason
    if positions.device != query.device:
        return f"the positions are on {positions.device.type}"
    if (length := known(query.shape[2])) is None or length > MAX_LENGTH:
        return f"handles up to {MAX_LENGTH} positions, not {query.shape[2]}"
    if query.shape[-1] % 2:
        return f"the last dimension must be even, not {query.shape[-1]}"
    if any(part.dim() > 4 or (part.dim() > 2 and part.shape[-3] != 1) for part in (cos, sin)):
        return "cos and sin differ from head to head"
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the columns of the cache are not neighbours"
    return None


@opaque(lambda query, *others: query.new_empty(query.shape), writes=(*WRITES, "key_scales", "value_scales"))
def rope_into_cache_cuda(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out = query.new_empty(query.shape)
    if out.numel() == 0:
        return out
    batch, heads, length, n = query.shape
    kv_heads, width = key.shape[1], value.shape[3]
    cos, sin = (part.expand(batch, 1, length, n) for part in (cos, sin))
    query, key, value, cos = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value, cos))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    block_n, block_v = power_of_two(n // 2), power_of_two(width)
    block_m = min(power_of_two(length), max(1, BLOCK_ELEMENTS // max(block_n, block_v)))
    launch(
        _rope_into_cache,
        (heads + 2 * kv_heads, cdiv(length, block_m), batch),
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        key_scales,
        value_scales,
        positions.contiguous(),
        out,
        heads,
        kv_heads,
        length,
        keys.shape[2],
        *(stride for x in (query, key, value, keys, values) for stride in x.stride()[:3]),
        *(stride for x in (key_scales, value_scales) for stride in (x.stride() if x is not None else (0, 0, 0))),
        cos.stride(0),
        cos.stride(2),
        HALF=n // 2,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        PDL=dependent_launch(query),
        num_warps=max(1, min(4, block_m * max(block_n, block_v) // 128)),
    )
    return out


@rope_into_cache.implementation("triton", refuses)
def rope_into_cache_triton(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, key_scales: Tensor | None = None, value_scales: Tensor | None = None, fixed: bool = False,
) -> Tensor:  # fmt: skip
    return rope_into_cache_cuda(query, key, value, cos, sin, keys, values, positions, key_scales, value_scales)


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, rows, HALF: tl.constexpr, BLOCK_N: tl.constexpr):
    """Both halves of the rows that are in `rows`."""
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = rows & (column < HALF)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    low = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + column + HALF, mask=inside, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + column, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + column + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + column, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + column + HALF, mask=inside, other=0.0).to(tl.float32)
    return (low * cos_low - high * sin_low).to(DTYPE), (high * cos_high + low * sin_high).to(DTYPE)


@triton.jit
def _put(x, scale, out_ptr, rows, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store rows, by `scale` as codes where there are to be codes."""
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = rows & (column < WIDTH)
    if out_ptr.dtype.element_ty == tl.int8:
        y = tl.clamp(tl.div_rn(x.to(tl.float32), scale), -127.0, 127.0)
        y = (y + 12582912.0) - 12582912.0  # what is added to 1.5 * 2^23 is rounded to an integer
        tl.store(out_ptr + column, y.to(tl.int8), mask=inside)
    elif out_ptr.dtype.element_ty == tl.uint8:
        y = tl.clamp(tl.div_rn(x.to(tl.float32), scale), -448.0, 448.0)
        tl.store(out_ptr + column, y.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=inside)
    else:
        tl.store(out_ptr + column, x, mask=inside)


@triton.jit
def _scale(top, codes_ptr, scales_ptr, at, rows):
    """The scale for codes of rows whose largest magnitudes are `top`, stored where there are scales."""
    scale = tl.div_rn(top, 127.0 if codes_ptr.dtype.element_ty == tl.int8 else 448.0)
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    if scales_ptr is not None:
        tl.store(scales_ptr + at, scale, mask=rows)
    return scale


@triton.jit
def _magnitude(low, high):
    """The largest of each row in two halves; no number where one is none, which a maximum does not show."""
    low, high = low.to(tl.float32), high.to(tl.float32)
    top = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1, keep_dims=True)
    return top + tl.sum((low + high) * 0.0, 1, keep_dims=True)  # type: ignore[operator]


@launched
def _rope_into_cache(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, positions_ptr,
    out_ptr, heads, kv_heads, length, capacity, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    keys_batch, keys_head, keys_row, values_batch, values_head, values_row, key_scales_batch, key_scales_head,
    key_scales_row, value_scales_batch, value_scales_head, value_scales_row, angle_batch, angle_row,
    HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, batch = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    # A position outside the cache is the caller's mistake, and must not become a write to other memory.
    position = tl.load(positions_ptr + row, mask=row < length, other=-1).to(tl.int64)
    written = (position >= 0) & (position < capacity)
    cos_ptr += batch * angle_batch + row * angle_row
    sin_ptr += batch * angle_batch + row * angle_row
    kv_head = head - heads
    if kv_head < 0:
        q_at = batch * q_batch + head * q_head + row * q_row
        low, high = _rotate(q_ptr + q_at, cos_ptr, sin_ptr, row < length, HALF, BLOCK_N)
        out = out_ptr + ((batch * heads + head) * length + row) * (2 * HALF)
        _put(low, 1.0, out, row < length, HALF, BLOCK_N)
        _put(high, 1.0, out + HALF, row < length, HALF, BLOCK_N)
    elif kv_head < kv_heads:
        k_at = batch * k_batch + kv_head * k_head + row * k_row
        low, high = _rotate(k_ptr + k_at, cos_ptr, sin_ptr, written, HALF, BLOCK_N)
        keys = keys_ptr + batch * keys_batch + kv_head * keys_head + position * keys_row
        scale_at = batch * key_scales_batch + kv_head * key_scales_head + position * key_scales_row
        scale = _scale(_magnitude(low, high), keys_ptr, key_scales_ptr, scale_at, written)
        _put(low, scale, keys, written, HALF, BLOCK_N)
        _put(high, scale, keys + HALF, written, HALF, BLOCK_N)
    else:
        column = tl.arange(0, BLOCK_V)[None, :]
        v_at = batch * v_batch + (kv_head - kv_heads) * v_head + row * v_row
        v = tl.load(v_ptr + v_at + column, mask=written & (column < WIDTH), other=0.0)
        values = values_ptr + batch * values_batch + (kv_head - kv_heads) * values_head + position * values_row
        scale_at = batch * value_scales_batch + (kv_head - kv_heads) * value_scales_head + position * value_scales_row
        value_scale = _scale(_magnitude(v, v), values_ptr, value_scales_ptr, scale_at, written)
        _put(v, value_scale, values, written, WIDTH, BLOCK_V)
