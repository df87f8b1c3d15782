"""attention_into_cache on Hopper as attention_warps, of a cache that need not hold the new key.

Each program turns the queries, a row a warp, and the new key. The one in whose part the new position lies writes it and
the new value to the cache, and adds what they give to its sums at the end; of the cache they are left out.
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._attention import mask_strides
from qcompile.kernels._attention_keys import fetch_ahead, mask_of, part_of
from qcompile.kernels._attention_operands import as_queries, column_of, of_products, of_queries, of_rows, together
from qcompile.kernels._attention_parts import given
from qcompile.kernels._attention_tiles import WarpsTile
from qcompile.kernels._attention_warps import begin_steps, rings, walk
from qcompile.kernels._clusters import enter
from qcompile.kernels._gluon import gl, gluon, launch_dependents, launched, wait
from qcompile.kernels.attention_warps import finish, launch_warps


def attend(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    positions: Tensor, mask: Tensor | None, scale: float, tile: WarpsTile,
) -> Tensor:  # fmt: skip
    """attention_into_cache_cuda of what attention_warps.refuses lets through; columns are neighbours, and cos and sin,
    (batch, 1, 1, columns), have the same strides."""
    batch, heads, _, width = query.shape
    kv_heads, capacity = keys.shape[1:3]
    rows = heads // kv_heads
    out = query.new_empty(batch, heads, 1, width)
    inputs = query, key, value, cos, sin, keys, values, positions, mask
    sizes = kv_heads, rows, capacity, scale, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.stride(0)
    mask_batch, _, _, mask_column = mask_strides(mask, batch, 1, 1, capacity)
    strides = *keys.stride()[:3], *values.stride()[:3], mask_batch, mask_column
    launch_warps(_step, inputs, out, (*sizes, *strides), (batch * kv_heads, rows, capacity), tile)
    return out


@launched
def _step(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, positions_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr,
    kv_heads, rows, capacity, scale, q_batch, q_head, k_batch, k_head, v_batch, v_head, angle_batch,
    keys_batch, keys_head, K_ROW: gl.constexpr, values_batch, values_head, V_ROW: gl.constexpr, mask_batch, mask_column,
    D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, SPLITS: gl.constexpr, CLUSTER: gl.constexpr,
    PIECE: gl.constexpr, PIECES: gl.constexpr, AHEAD: gl.constexpr, IN_ONE: gl.constexpr, EARLY: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    if CLUSTER:
        enter(given(SPLITS, ROWS, D))
    if PDL and EARLY:
        launch_dependents()
    pair, part = (gl.program_id(0) // SPLITS).to(gl.int64), gl.program_id(0) % SPLITS
    batch, kv_head = pair // kv_heads, pair % kv_heads
    keys_ptr += batch * keys_batch + kv_head * keys_head
    values_ptr += batch * values_batch + kv_head * values_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch
    masks = mask_ptr, mask_column, capacity, None
    if PDL:
        fetch_ahead(keys_ptr, values_ptr, masks, part, K_ROW, V_ROW, D, KEYS, SPLITS, IN_ONE, PIECE, PIECES)
        wait()
    position = gl.load(positions_ptr).to(gl.int64)
    # All reads before what depends on one of them.
    L: gl.constexpr = gl.BlockedLayout([1, D // 32], [1, 32], [WARPS, 1], [1, 0])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, D, layout=gl.SliceLayout(0, L))[None, :]
    q_ptr += batch * q_batch + kv_head * rows * q_head
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    q, q_other = _halves(q_ptr + row * q_head, d, (row < rows) & (d < D), D)
    k, k_other = _halves(k_ptr, d, d < D, D)
    v = gl.load(v_ptr + d)
    cos, sin = gl.load(cos_ptr + (batch * angle_batch + d)), gl.load(sin_ptr + (batch * angle_batch + d))
    masks = mask_ptr, mask_column, capacity, position
    room = rings(D, KEYS, AHEAD)
    steps = begin_steps(keys_ptr, values_ptr, masks, part, room, K_ROW, V_ROW, SPLITS, IN_ONE)
    q, k = _rotated(q, q_other, cos, sin, d, D), _rotated(k, k_other, cos, sin, d, D)
    # A position outside the cache is the caller's mistake, and must not become a write to other memory.
    owns = (position >= 0) & (position < capacity) & (part_of(position, KEYS, SPLITS, IN_ONE) == part)
    gl.store(keys_ptr + (position * K_ROW + d), k, mask=owns & (d < D))
    gl.store(values_ptr + (position * V_ROW + d), v, mask=owns & (d < D))
    own = gl.where(owns, position, capacity.to(gl.int64))
    _, attended = mask_of((mask_ptr, mask_column, capacity, None), own, "")
    logits = gl.where(attended, gl.sum(q.to(gl.float32) * k.to(gl.float32), 1) * scale, float("-inf"))
    of_new = gl.allocate_shared_memory(gl.float32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]), logits)
    y = gl.full([WARPS, D, 8], 0.0, gl.float32, of_products(WARPS))
    top = gl.full([WARPS, 8], float("-inf"), gl.float32, of_rows(WARPS, KEYS))
    total = gl.full([WARPS, 8], 0.0, gl.float32, of_rows(WARPS, KEYS))
    sums = walk(
        _for_all_warps(q), (y, top, total), steps, keys_ptr, values_ptr, masks, part, room, scale,
        K_ROW, V_ROW, SPLITS, IN_ONE,
    )  # fmt: skip
    if PDL and not EARLY:
        launch_dependents()  # not earlier: waiting programs would take bandwidth from those that read
    sums = _with_new(together(sums, ROWS), of_new, v_ptr)
    finish(sums, out_ptr, sums_ptr, parts_ptr, pair, part, rows, SPLITS, CLUSTER)


@gluon.jit
def _halves(x_ptr, d, inside, D: gl.constexpr):
    """The rows at x_ptr, and what rope mixes them with."""
    return gl.load(x_ptr + d, mask=inside, other=0.0), gl.load(x_ptr + (d + D // 2) % D, mask=inside, other=0.0)


@gluon.jit
def _rotated(x, other, cos, sin, d, D: gl.constexpr):
    """rope of rows, rounded to their dtype."""
    other = other.to(gl.float32)
    y = x.to(gl.float32) * cos.to(gl.float32) + gl.where(d < D // 2, -other, other) * sin.to(gl.float32)
    return y.to(x.dtype)


@gluon.jit
def _for_all_warps(q):
    """The operand of eight rows (8, columns)."""
    L: gl.constexpr = of_queries(gl.num_warps(), q.shape[1])
    room = gl.allocate_shared_memory(q.dtype, q.shape, gl.SwizzledSharedLayout(8, 1, 8, [1, 0]), q)
    q = gl.expand_dims(room.load(gl.SliceLayout(0, L)), 0)
    return as_queries(gl.broadcast(q, gl.full(L.shape, 0.0, q.dtype, L))[0])


@gluon.jit
def _with_new(sums, of_new, v_ptr):
    """Sums (columns, rows), and the new key's, whose logits are of_new, -inf if it is not to be added here."""
    y, top, total = sums
    L: gl.constexpr = y.type.layout
    column = column_of(gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, L)))[:, None]
    logits = of_new.slice(0, y.shape[1], 0).load(gl.SliceLayout(0, L))[None, :]
    new_top = gl.maximum(top, logits)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)
    shrink, weight = gl.exp(top - base), gl.exp(logits - base)
    return y * shrink + gl.load(v_ptr + column).to(gl.float32) * weight, new_top, total * shrink + weight
