"""attention_into_cache: `_step` over parts of the keys, and attention_decode's `_combine` of what they found.

As `_split` of attention_decode, for one query position. Each program turns the queries that it loads; the one in whose
part the new position lies turns the new key, uses it and the new value from registers, and writes them to the cache.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels import _tuning, attention_decode, rope_into_cache
from qcompile.kernels._tiles import (
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    power_of_two,
    tl,
    triton,
)
from qcompile.kernels.attention_decode import (
    SCAN_ELEMENTS,
    _attended,
    _capped,
    _leave,
    _product,
    _seen_steps,
    _weights,
    combine,
)
from qcompile.ops.attention_into_cache import attention_into_cache
from qcompile.ops.registry import known, opaque

MAX_GROUP = 64


def refuses(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None,
) -> str | None:  # fmt: skip
    if reason := rope_into_cache.refuses(query, key, value, cos, sin, keys, values, positions):
        return reason
    if reason := attention_decode.refuses(query, keys, values, mask, False, scale, softcap):
        return reason
    if known(query.shape[2]) != 1:
        return f"handles one position, not {query.shape[2]}"
    if (heads := known(query.shape[1] // keys.shape[1])) is None or heads > MAX_GROUP:
        return f"handles up to {MAX_GROUP} query heads a key, not {heads}"
    if mask is not None and mask.dim() > 2 and known(mask.shape[-3]) != 1:
        return "the mask differs from head to head"
    return None


@opaque(
    lambda query, key, value, cos, sin, keys, values, *rest: query.new_empty(*query.shape[:3], values.shape[3]),
    writes=rope_into_cache.WRITES,
)
def attention_into_cache_cuda(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    batch, heads, _, width = query.shape
    kv_heads, capacity, value_width = *keys.shape[1:3], values.shape[3]
    out = query.new_empty(batch, heads, 1, value_width)
    if out.numel() == 0:
        return out
    cos, sin = (part.expand(batch, 1, 1, width) for part in (cos, sin))
    query, key, value, cos = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value, cos))
    if sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    block_d, block_dv = (max(16, power_of_two(n)) for n in (width, value_width))
    group = heads // kv_heads
    device = _tuning.Device.of(keys.device)
    tile = _tuning.attention_tile(batch * kv_heads, group, capacity, max(block_d, block_dv), keys.itemsize, device)
    mask_strides = [0, 0] if mask is None else mask.expand(batch, 1, 1, capacity).stride()[::3]
    sums = parts = None
    if tile.splits > 1:
        sums, parts = attention_decode.partial_results(query, batch * heads, tile.splits, value_width)
    launch(
        _step,
        (batch * kv_heads, tile.splits),
        query,
        key,
        value,
        cos,
        sin,
        keys,
        values,
        positions,
        mask,
        out,
        sums,
        parts,
        kv_heads,
        group,
        capacity,
        scale,
        softcap,
        *(stride for x in (query, key, value) for stride in x.stride()[:2]),
        cos.stride(0),
        *(stride for x in (keys, values) for stride in x.stride()[:3]),
        *mask_strides,
        D=width,
        DV=value_width,
        BLOCK_M=max(tile.rows, power_of_two(group)),
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        SCAN=SCAN_ELEMENTS,
        EARLY=cdiv(capacity, tile.keys * tile.splits) <= 2,
        PDL=dependent_launch(query),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if sums is not None and parts is not None:
        combine(sums, parts, out)
    return out


@attention_into_cache.implementation("triton", refuses, device="cuda")
def attention_into_cache_triton(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    return attention_into_cache_cuda(query, key, value, cos, sin, keys, values, positions, mask, scale, softcap)


@triton.jit
def _turned(x_ptr, inside, cos, sin, d, HALF: tl.constexpr):
    """rope of the rows at x_ptr, rounded to their dtype."""
    x = tl.load(x_ptr + d, mask=inside, other=0.0)
    other = tl.load(x_ptr + tl.where(d < HALF, d + HALF, d - HALF), mask=inside, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * cos + tl.where(d < HALF, -other, other) * sin).to(x.dtype)


@triton.jit
def _step(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, positions_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr,
    kv_heads, group, capacity, scale, softcap, q_batch, q_head, k_batch, k_head, v_batch, v_head, angle_batch,
    keys_batch, keys_head, keys_row, values_batch, values_head, values_row, mask_batch, mask_column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SCAN: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        if EARLY:
            gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0).to(tl.int64)
    batch, kv_head = pair // kv_heads, pair % kv_heads
    part, splits = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, BLOCK_M)[:, None]
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    # A position outside the cache is the caller's mistake, and must not become a write to other memory.
    position = tl.load(positions_ptr)
    cos = tl.load(cos_ptr + batch * angle_batch + d, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + batch * angle_batch + d, mask=d < D, other=0.0).to(tl.float32)
    head = kv_head * group + row
    q = _turned(q_ptr + batch * q_batch + head * q_head, (row < group) & (d < D), cos, sin, d, D // 2)
    new_k = _turned(k_ptr + batch * k_batch + kv_head * k_head, d < D, cos, sin, d, D // 2)
    new_v = tl.load(v_ptr + batch * v_batch + kv_head * v_head + dv, mask=dv < DV, other=0.0)
    # Step s of this program is block s * splits + part.
    steps = tl.cdiv(tl.cdiv(capacity, BLOCK_N) - part, splits)
    first, end = 0, steps
    mask_ptr = mask_ptr if mask_ptr is None else mask_ptr + batch * mask_batch
    if mask_ptr is not None:
        rows = tl.full((1, 1), 1, tl.int1)
        first, end = _seen_steps(mask_ptr, mask_column, rows, steps, capacity, BLOCK_N, 1, SCAN)
    keys_ptr += batch * keys_batch + kv_head * keys_head + d
    values_ptr += batch * values_batch + kv_head * values_head + dv
    offset = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    # From zero: Triton 3.9 loses sight of the alignment of loads in a loop that begins at a reduction's result.
    for step in range(0, end - first):  # type: ignore[operator]
        n = ((first + step) * splits + part) * BLOCK_N + offset  # type: ignore[operator]
        down, across = n[:, None].to(tl.int64), n[None, :].to(tl.int64)
        k = tl.load(keys_ptr + down * keys_row, mask=(down < capacity) & (d < D), other=0.0)
        v = tl.load(values_ptr + down * values_row, mask=(down < capacity) & (dv < DV), other=0.0)
        k, v = tl.where(down == position, new_k, k), tl.where(down == position, new_v, v)
        logits = _product(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * scale
        if softcap is not None:
            logits = _capped(logits, softcap)
        inside = across < capacity
        if mask_ptr is not None:
            mask = tl.load(mask_ptr + across * mask_column, mask=inside)
            inside &= _attended(mask)
            if mask.dtype != tl.int1:
                logits += mask.to(tl.float32)
        logits = tl.where(inside, logits, float("-inf"))
        p, shrink, top, total = _weights(logits, top, total)
        y = _product(p, v, y * shrink)
    if PDL and not EARLY:
        gdc_launch_dependents()
    if (position >= 0) & (position < capacity) & (position // BLOCK_N % splits == part):
        at = position.to(tl.int64)
        tl.store(keys_ptr + at * keys_row, new_k, mask=d < D)
        tl.store(values_ptr + at * values_row, new_v, mask=dv < DV)
    _leave(y, top, total, out_ptr, sums_ptr, parts_ptr, pair * group + row, row < group, dv, DV)
