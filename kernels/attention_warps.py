"""Attention of up to eight query rows on Hopper, whose warps have keys of their own.

As `_split` of attention_decode; but warps wait for one another at the end alone, and read operands of mma from where
they have been copied to in shared memory. A thread needs few registers, which leaves room for programs of the next
kernel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning
from qcompile.kernels._attention import mask_strides
from qcompile.kernels._attention_keys import fetch_ahead
from qcompile.kernels._attention_operands import as_queries, column_of, of_products, of_queries, of_rows, together
from qcompile.kernels._attention_parts import combine, given, leave, of_parts, partial_results
from qcompile.kernels._attention_tiles import WarpsTile
from qcompile.kernels._attention_warps import begin_steps, rings, walk
from qcompile.kernels._clusters import are_launched, enter, exchange, give, launch_clusters, meet, take
from qcompile.kernels._gluon import gl, gluon, launch_dependents, launched, wait
from qcompile.kernels._tiles import INTERPRET, dependent_launch, launch, power_of_two

MAX_ROWS = 8
# Warps, and keys of a step of each.
WARPS, WARP_KEYS = 8, 16


def refuses(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, softcap: float | None = None
) -> str | None:
    """Why this kernel does not take the call, or None: it takes what is like the cases that have been timed."""
    if gl is None or INTERPRET:
        return "needs Gluon, which came with Triton 3.5 and has no interpreter"
    if not query.is_cuda or _tuning.Device.of(query.device).major != 9:
        return "needs a GPU of compute capability 9.0"
    batch, heads, length, width = query.shape
    if query.dtype != torch.bfloat16 or width != 128 or values.shape[3] != width:
        return f"takes heads of 128 columns of bfloat16, not {width} and {values.shape[3]} of {query.dtype}"
    if softcap is not None:
        return "takes no soft-cap"
    if (rows := heads // keys.shape[1] * length) > MAX_ROWS:
        return f"takes up to {MAX_ROWS} query rows of a key, not {rows}"
    if (pairs := batch * keys.shape[1]) > (most := _tuning.Device.of(query.device).processors):
        # A program fills a multiprocessor: those that are left over would take a turn of their own.
        return f"takes up to {most} sequences times heads of keys, not {pairs}"
    for cache in (keys, values):
        apart = [stride for size, stride in zip(cache.shape, cache.stride()[:3]) if size > 1]
        if cache.stride(3) != 1 or cache.data_ptr() % 16 or any(stride % 8 for stride in apart):
            return "takes keys and values whose rows begin at multiples of 16 bytes"
    if mask is not None and (
        mask.dtype != torch.bool or any(mask_strides(mask, batch, heads, length, keys.shape[2])[1:3])
    ):
        return "takes a boolean mask that all query rows share"
    return None


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, tile: WarpsTile | None = None
) -> Tensor:
    """attention_decode.attend of what `refuses` lets through."""
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1:3]
    rows = heads // kv_heads * length
    out = query.new_empty(batch, heads, length, width)
    mask_batch, _, _, mask_column = mask_strides(mask, batch, heads, length, keys)
    inputs, sizes = (query, key, value, mask), (kv_heads, rows, length, keys, scale, *query.stride()[:3])
    strides = *key.stride()[:3], *value.stride()[:3], mask_batch, mask_column
    if tile is None:
        tile = _attention_tiles.warps_tile(batch * kv_heads, keys, _tuning.Device.of(key.device))
    launch_warps(_attend, inputs, out, (*sizes, *strides), (batch * kv_heads, rows, keys), tile)
    return out


def launch_warps(
    kernel: Any, inputs: tuple[Tensor | None, ...], out: Tensor, sizes: tuple[Any, ...], shape: tuple[int, int, int],
    tile: WarpsTile,
) -> None:  # fmt: skip
    """Of `shape` are the sequences times key/value heads, the query rows of each, and the keys."""
    pairs, rows, keys = shape
    if tile.cluster and not are_launched(out.device, tile.splits):
        tile = replace(tile, cluster=False)
    sums = parts = None
    if tile.splits > 1 and not tile.cluster:
        sums, parts = partial_results(out, pairs * rows, tile.splits, out.shape[-1])
    constants = constants_of(tile, rows, keys, out.shape[-1])
    constants |= {"PDL": dependent_launch(out), "num_warps": constants.pop("warps")}
    if tile.cluster:
        launch_clusters(kernel, tile.splits, (pairs,), *inputs, out, sums, parts, *sizes, **constants)
    else:
        launch(kernel, (pairs * tile.splits,), *inputs, out, sums, parts, *sizes, **constants)
    if sums is not None and parts is not None:
        combine(sums, parts, out)


def constants_of(tile: WarpsTile, rows: int, keys: int, width: int) -> dict[str, Any]:
    return {
        "D": width,
        # As many numbers of the result as there are threads, at least.
        "ROWS": max(4, power_of_two(rows)),
        "KEYS": WARP_KEYS,
        "SPLITS": tile.splits,
        "CLUSTER": tile.cluster,
        "PIECE": tile.piece,
        "PIECES": tile.pieces,
        "AHEAD": tile.ahead,
        "IN_ONE": keys <= WARP_KEYS * WARPS * tile.splits,
        "EARLY": tile.early,
        "warps": WARPS,
    }


@launched
def _attend(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr, kv_heads, rows, length, keys, scale,
    q_batch, q_head, q_row, k_batch, k_head, K_ROW: gl.constexpr, v_batch, v_head, V_ROW: gl.constexpr,
    mask_batch, mask_column,
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
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch
    masks = mask_ptr, mask_column, keys, None
    if PDL:
        fetch_ahead(k_ptr, v_ptr, masks, part, K_ROW, V_ROW, D, KEYS, SPLITS, IN_ONE, PIECE, PIECES)
        wait()
    # Row r is query position r % length of head r // length of the group.
    row, d = _query_places(WARPS, D)
    q_at = batch * q_batch + (kv_head * (rows // length) + row // length) * q_head
    q = gl.load(q_ptr + (q_at + (row % length).to(gl.int64) * q_row + d), mask=(row < rows) & (d >= 0), other=0.0)
    room = rings(D, KEYS, AHEAD)
    steps = begin_steps(k_ptr, v_ptr, masks, part, room, K_ROW, V_ROW, SPLITS, IN_ONE)
    y = gl.full([WARPS, D, 8], 0.0, gl.float32, of_products(WARPS))
    top = gl.full([WARPS, 8], float("-inf"), gl.float32, of_rows(WARPS, KEYS))
    total = gl.full([WARPS, 8], 0.0, gl.float32, of_rows(WARPS, KEYS))
    sums = walk(
        as_queries(q), (y, top, total), steps, k_ptr, v_ptr, masks, part, room, scale, K_ROW, V_ROW, SPLITS, IN_ONE
    )
    if PDL and not EARLY:
        launch_dependents()  # not earlier: waiting programs would take bandwidth from those that read
    finish(together(sums, ROWS), out_ptr, sums_ptr, parts_ptr, pair, part, rows, SPLITS, CLUSTER)


@gluon.jit
def _query_places(WARPS: gl.constexpr, D: gl.constexpr):
    """Rows and columns of queries, in all warps the same."""
    L: gl.constexpr = of_queries(WARPS, D)
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    row = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    return row + 0 * warp, gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]


@gluon.jit
def finish(sums, out_ptr, sums_ptr, parts_ptr, pair, part, rows, SPLITS: gl.constexpr, CLUSTER: gl.constexpr):
    """Store what a program has found, (columns, rows), or what `combine` or its cluster sums."""
    y, top, total = sums
    D: gl.constexpr = y.shape[0]
    ROWS: gl.constexpr = y.shape[1]
    column = column_of(gl.arange(0, D, layout=gl.SliceLayout(1, y.type.layout)))[:, None]
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, y.type.layout))[None, :]
    if CLUSTER:
        _to_cluster(y, top, total, out_ptr, pair * rows, row, rows, column, part, SPLITS)
    else:
        leave(y, top, total, out_ptr, sums_ptr, parts_ptr, pair * rows + row, row < rows, part, SPLITS, column, D)


@gluon.jit
def _to_cluster(y, top, total, out_ptr, first, row, rows, column, part, SPLITS: gl.constexpr):
    """As _attention_parts.leave_to_cluster, of y (columns, rows), in the order of `column`."""
    ROWS: gl.constexpr = y.shape[1]
    WIDTH: gl.constexpr = y.shape[0] // SPLITS
    MADE: gl.constexpr = ROWS * WIDTH
    TOPS: gl.constexpr = SPLITS * MADE
    TOTALS: gl.constexpr = TOPS + SPLITS * ROWS
    column, row = gl.broadcast(column, row)
    at = part * ROWS + row
    meet()
    give(y, at * WIDTH + column % WIDTH, column // WIDTH, row < ROWS)
    # To each program, as many as there are.
    give(gl.broadcast(top, row)[0], TOPS + at, column, column < SPLITS)
    give(gl.broadcast(total, row)[0], TOTALS + at, column, column < SPLITS)
    exchange()
    NEXT: gl.constexpr = min(32, MADE)
    L: gl.constexpr = gl.BlockedLayout([SPLITS, 1], [32 // NEXT, NEXT], [1, gl.num_warps()], [0, 1])
    i = gl.arange(0, MADE, layout=gl.SliceLayout(0, L))[None, :]
    part_of = gl.arange(0, SPLITS, layout=gl.SliceLayout(1, L))[:, None]
    at = part_of * ROWS + i // WIDTH
    y = of_parts(take(part_of * MADE + i), take(TOPS + at), take(TOTALS + at))[None, :]
    row, column = i // WIDTH, part * WIDTH + i % WIDTH
    gl.store(out_ptr + ((first + row) * (SPLITS * WIDTH) + column), y.to(out_ptr.dtype.element_ty), mask=row < rows)
