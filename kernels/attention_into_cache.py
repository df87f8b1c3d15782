"""attention_into_cache: `_step` over parts of the keys, whose sums are attention_decode's.

As `_split` of attention_decode, for one query position. Each program turns the queries that it loads; the one in whose
part the new position lies turns the new key, writes it and the new value to the cache, and reads them there as others.
While it waits for the kernel before, it has the first keys and values brought to the L2 cache.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels import (
    _attention_tiles,
    _tuning,
    attention_decode,
    attention_warps,
    attention_warps_into_cache,
    rope_into_cache,
)
from qcompile.kernels._attention import (
    FETCHED,
    SCAN_ELEMENTS,
    add_product,
    attended_in,
    beside,
    fetch_ahead,
    key_places,
    mask_at,
    mask_strides,
    masked,
    seen_steps,
    together,
    turned_keys,
    weigh,
)
from qcompile.kernels._attention_parts import combine, given, leave, leave_to_cluster, partial_results
from qcompile.kernels._clusters import enter
from qcompile.kernels._tiles import (
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    power_of_two,
    tl,
    triton,
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
    group = heads // kv_heads
    device = _tuning.Device.of(keys.device)
    by_warps = attention_warps.refuses(query, keys, values, mask, softcap) is None
    if by_warps and (tile := _attention_tiles.step_tile(batch * kv_heads, capacity, device)):
        return attention_warps_into_cache.attend(
            query, key, value, cos, sin, keys, values, positions, mask, scale, tile
        )
    block_d, block_dv = (max(16, power_of_two(n)) for n in (width, value_width))
    tile = _attention_tiles.attention_tile(
        batch * kv_heads, group, capacity, max(block_d, block_dv), keys.itemsize, device
    )
    tile = attention_decode.as_launched(tile, keys.device)
    sums = parts = None
    if tile.splits > 1 and not tile.cluster:
        sums, parts = partial_results(query, batch * heads, tile.splits, value_width)
    attention_decode.launch_parts(
        _step,
        tile,
        (batch * kv_heads, 1),
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
        *mask_strides(mask, batch, 1, 1, capacity)[::3],
        D=width,
        DV=value_width,
        BLOCK_M=max(tile.rows, power_of_two(group)),
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BESIDE=tile.beside,
        ROWS=power_of_two(group),
        SCAN=SCAN_ELEMENTS,
        FETCHED=FETCHED,
        IN_ONE=0 < capacity <= tile.keys * tile.splits,
        EARLY=attention_decode.lets_start(tile, batch * kv_heads, capacity, device),
        PDL=dependent_launch(query),
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
def _halves(x_ptr, inside, d, HALF: tl.constexpr):
    """The rows at x_ptr, and what rope mixes them with."""
    x = tl.load(x_ptr + d, mask=inside, other=0.0)
    return x, tl.load(x_ptr + tl.where(d < HALF, d + HALF, d - HALF), mask=inside, other=0.0)


@triton.jit
def _rotated(x, other, cos, sin, d, HALF: tl.constexpr):
    """rope of rows, rounded to their dtype."""
    other = other.to(tl.float32)
    y = x.to(tl.float32) * cos.to(tl.float32) + tl.where(d < HALF, -other, other) * sin.to(tl.float32)
    return y.to(x.dtype)


@triton.jit
def _step(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, positions_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr,
    kv_heads, group, capacity, scale, softcap, q_batch, q_head, k_batch, k_head, v_batch, v_head, angle_batch,
    keys_batch, keys_head, keys_row, values_batch, values_head, values_row, mask_batch, mask_column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr, SCAN: tl.constexpr, FETCHED: tl.constexpr,
    SPLITS: tl.constexpr, CLUSTER: tl.constexpr, IN_ONE: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if CLUSTER:
        enter(given(SPLITS, ROWS, BLOCK_DV))
    if PDL and EARLY:
        gdc_launch_dependents()
    pair, part = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    batch, kv_head = pair // kv_heads, pair % kv_heads
    row = tl.arange(0, BLOCK_M)[:, None]
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    keys_ptr += batch * keys_batch + kv_head * keys_head
    values_ptr += batch * values_batch + kv_head * values_head
    # Step s of this program is block s * SPLITS + part.
    first, end, limit = 0, tl.cdiv(tl.cdiv(capacity, BLOCK_N) - part, SPLITS), capacity
    rows = tl.full((1, 1), 1, tl.int1)
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch
    if PDL:
        fetch_ahead(
            keys_ptr, values_ptr, mask_ptr, part, SPLITS, capacity, keys_row, 1, values_row, 1, mask_column,
            FETCHED, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        gdc_wait()
    # A position outside the cache is the caller's mistake, and must not become a write to other memory.
    position = tl.full((1, 1), 0, tl.int64) + tl.load(positions_ptr)
    owns = (position >= 0) & (position < capacity) & (position // BLOCK_N % SPLITS == part)
    # All reads before what depends on one of them.
    cos = tl.load(cos_ptr + batch * angle_batch + d, mask=d < D, other=0.0)
    sin = tl.load(sin_ptr + batch * angle_batch + d, mask=d < D, other=0.0)
    head = kv_head * group + row
    q, q_other = _halves(q_ptr + batch * q_batch + head * q_head, (row < group) & (d < D), d, D // 2)
    new_k, k_other = _halves(k_ptr + batch * k_batch + kv_head * k_head, d < D, d, D // 2)
    new_v = tl.load(v_ptr + batch * v_batch + kv_head * v_head + dv, mask=dv < DV, other=0.0)
    down, across = key_places(BLOCK_N, BESIDE)
    wanted = rows
    if mask_ptr is not None and IN_ONE:
        wanted = attended_in(mask_ptr, part * BLOCK_N + down, mask_column, capacity)
    if mask_ptr is not None and not IN_ONE:
        first, end, limit = seen_steps(mask_ptr, mask_column, rows, part, SPLITS, end, capacity, BLOCK_N, 1, SCAN, "")
    q, new_k = _rotated(q, q_other, cos, sin, d, D // 2), _rotated(new_k, k_other, cos, sin, d, D // 2)
    tl.store(keys_ptr + position * keys_row + d, new_k, mask=owns & (d < D))
    tl.store(values_ptr + position * values_row + dv, new_v, mask=owns & (dv < DV))
    tl.debug_barrier()  # what one thread has written others read
    top = beside(tl.full((BLOCK_M, 1), float("-inf"), tl.float32), BESIDE)
    total = beside(tl.zeros((BLOCK_M, 1), tl.float32), BESIDE)
    y = beside(tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), BESIDE)
    q = beside(q, BESIDE)
    n = (first * SPLITS + part) * BLOCK_N + across
    mask = mask_at(mask_ptr, n, mask_column, n < limit)
    # From zero: Triton 3.9 loses sight of the alignment of loads in a loop that begins at a reduction's result.
    for step in range(0, end - first):  # type: ignore[operator]
        start = ((first + step) * SPLITS + part) * BLOCK_N  # type: ignore[operator]
        k_at, v_at = keys_ptr + start.to(tl.int64) * keys_row, values_ptr + start.to(tl.int64) * values_row
        k = tl.load(k_at + (down * keys_row + d), mask=(start + down < limit) & wanted & (d < D), other=0.0)
        v = tl.load(v_at + (down * values_row + dv), mask=(start + down < limit) & wanted & (dv < DV), other=0.0)
        logits = masked(add_product(q, turned_keys(k), None) * scale, mask, n < limit, softcap)
        n += SPLITS * BLOCK_N
        mask = mask_at(mask_ptr, n, mask_column, n < limit)  # the next step's, which nothing waits for here
        p, shrink, top, total = weigh(logits, top, total)
        y = add_product(p, v, y * shrink)
    if PDL and not EARLY:
        gdc_launch_dependents()
    if CLUSTER:
        leave_to_cluster(y, top, total, out_ptr, pair * group, row, group, part, DV, SPLITS, ROWS)
    else:
        y, top, total = together(y, top, total)
        leave(y, top, total, out_ptr, sums_ptr, parts_ptr, pair * group + row, row < group, part, SPLITS, dv, DV)
