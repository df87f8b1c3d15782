"""Attention of few query rows, as in decoding: `_split` over parts of the keys.

One program of `_split` takes the query rows of all heads that share a key/value head, so that keys and values are read
once, and every parts-th block of keys, so that a cache filled halfway is work for all. It reads its part of the mask
first and goes from the first block in which anyone attends to the last such key. (Dao et al. 2023, flash-decoding.)
Of few rows each warp takes its share of a block and keeps its own sums, so that warps wait for one another at the end
alone: such tensors have a first axis of BESIDE warps more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_warps
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
from qcompile.kernels._clusters import are_launched, enter, launch_clusters
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
)
from qcompile.ops.attention import attention
from qcompile.ops.registry import known, opaque

MAX_LENGTH = 8
MAX_WIDTH = 256


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
    tile: _attention_tiles.AttentionTile | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The op without is_causal, by the tile that is given or else chosen."""
    batch, heads, length, width = query.shape
    kv_heads, keys, value_width = *key.shape[1:3], value.shape[3]
    out = query.new_empty(batch, heads, length, value_width)
    if out.numel() == 0:
        return out
    if query.stride(3) != 1:
        query = query.contiguous()
    if tile is None and attention_warps.refuses(query, key, value, mask, softcap) is None:
        return attention_warps.attend(query, key, value, mask, scale)
    rows = heads // kv_heads * length
    block_d, block_dv = (max(16, power_of_two(n)) for n in (width, value_width))
    if tile is None:
        device = _tuning.Device.of(key.device)
        tile = _attention_tiles.attention_tile(
            batch * kv_heads, rows, keys, max(block_d, block_dv), key.itemsize, device
        )
    tile = as_launched(tile, key.device)
    strides = mask_strides(mask, batch, heads, length, keys)
    mask_rows = tile.rows if any(strides[1:3]) else 1
    sums = parts = None
    if tile.splits > 1 and not tile.cluster:
        sums, parts = partial_results(query, batch * heads * length, tile.splits, value_width)
    launch_parts(
        _split,
        tile,
        (batch * kv_heads, cdiv(rows, tile.rows)),
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
        *strides,
        D=width,
        DV=value_width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BESIDE=tile.beside,
        ROWS=min(tile.rows, power_of_two(rows)),
        MASK_ROWS=mask_rows,
        SCAN=max(16, SCAN_ELEMENTS // mask_rows),
        FETCHED=FETCHED,
        IN_ONE=mask_rows == 1 and 0 < keys <= tile.keys * tile.splits,
        EARLY=lets_start(tile, batch * kv_heads, keys, _tuning.Device.of(key.device)),
        PDL=dependent_launch(query),
    )
    if sums is not None and parts is not None:
        combine(sums, parts, out)
    return out


def as_launched(tile: _attention_tiles.AttentionTile, device: torch.device) -> _attention_tiles.AttentionTile:
    """Without a cluster where the driver launches none."""
    return tile if not tile.cluster or are_launched(device, tile.splits) else replace(tile, cluster=False)


def launch_parts(kernel, tile: _attention_tiles.AttentionTile, grid: tuple[int, int], *args, **constants) -> None:
    """`grid` counts sequences and key/value heads, and tiles of their query rows; for each there are as many programs
    as `tile` has parts, in one cluster or not."""
    constants |= {"SPLITS": tile.splits, "CLUSTER": tile.cluster}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.cluster:
        launch_clusters(kernel, tile.splits, grid, *args, **constants)
    else:
        launch(kernel, (grid[0] * tile.splits, grid[1]), *args, **constants)


def lets_start(tile: _attention_tiles.AttentionTile, pairs: int, keys: int, device: _tuning.Device) -> bool:
    """May the next kernel start when this one does? Its programs, which wait, take room and bandwidth from this one's;
    those of `_combine` take little, and a small grid leaves room.

    NOTE: a layer of Llama-3-8B, H100: with `_combine`, at batch 1, 60.9 µs, 63.9 if it starts when the keys are read;
    without it, at batch 16, 101.3 and 98.4.
    """
    small = tile.splits > 1 and pairs * tile.splits <= device.processors
    return small or cdiv(keys, tile.keys * tile.splits) <= 2


@launched
def _split(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr, kv_heads, rows, length, keys, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, k_column, v_batch, v_head, v_row, v_column,
    mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BESIDE: tl.constexpr, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr,
    SCAN: tl.constexpr, FETCHED: tl.constexpr, SPLITS: tl.constexpr, CLUSTER: tl.constexpr,
    IN_ONE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if CLUSTER:
        enter(given(SPLITS, ROWS, BLOCK_DV))
    if PDL and EARLY:
        gdc_launch_dependents()
    pair, part = (tl.program_id(0) // SPLITS).to(tl.int64), tl.program_id(0) % SPLITS
    batch, kv_head = pair // kv_heads, pair % kv_heads
    # Row r is query position r % length of head r // length of the group.
    first_row = tl.program_id(1) * BLOCK_M
    row = (first_row + tl.arange(0, BLOCK_M))[:, None]
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    # Step s of this program is block s * SPLITS + part.
    first, end, limit = 0, tl.cdiv(tl.cdiv(keys, BLOCK_N) - part, SPLITS), keys
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch
    if PDL:
        first_ptr = None
        if mask_ptr is not None:  # the mask of the first row, for all
            first_ptr = mask_ptr + (kv_head * (rows // length) + first_row // length) * mask_head
            first_ptr += (first_row % length).to(tl.int64) * mask_row
        fetch_ahead(
            k_ptr, v_ptr, first_ptr, part, SPLITS, keys, k_row, k_column, v_row, v_column, mask_column,
            FETCHED, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        gdc_wait()
    seen_row = (first_row + tl.arange(0, MASK_ROWS))[:, None]
    seen = seen_row < rows
    if mask_ptr is not None:
        seen_head = kv_head * (rows // length) + seen_row // length
        mask_ptr += seen_head * mask_head + (seen_row % length).to(tl.int64) * mask_row
    head = kv_head * (rows // length) + row // length
    q_at = batch * q_batch + head * q_head + (row % length).to(tl.int64) * q_row
    q = tl.load(q_ptr + q_at + d, mask=(row < rows) & (d < D))
    down, across = key_places(BLOCK_N, BESIDE)
    wanted = tl.full((1, 1), 1, tl.int1)
    if mask_ptr is not None and IN_ONE:
        wanted = attended_in(mask_ptr, part * BLOCK_N + down, mask_column, keys)
    if mask_ptr is not None and not IN_ONE:
        first, end, limit = seen_steps(
            mask_ptr, mask_column, seen, part, SPLITS, end, keys, BLOCK_N, MASK_ROWS, SCAN, ""
        )
    # Here, or q would be waited for before the mask is read.
    q = beside(tl.where((row < rows) & (d < D), q, 0.0), BESIDE)
    k_ptr += d * k_column
    v_ptr += dv * v_column
    top = beside(tl.full((BLOCK_M, 1), float("-inf"), tl.float32), BESIDE)
    total = beside(tl.zeros((BLOCK_M, 1), tl.float32), BESIDE)
    y = beside(tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), BESIDE)
    n = (first * SPLITS + part) * BLOCK_N + across
    inside = (n < limit) & seen
    mask = mask_at(mask_ptr, n, mask_column, inside)
    # From zero: Triton 3.9 loses sight of the alignment of loads in a loop that begins at a reduction's result.
    for step in range(0, end - first):  # type: ignore[operator]
        start = ((first + step) * SPLITS + part) * BLOCK_N  # type: ignore[operator]
        k_at, v_at = k_ptr + start.to(tl.int64) * k_row, v_ptr + start.to(tl.int64) * v_row
        k = tl.load(k_at + down * k_row, mask=(start + down < limit) & wanted & (d < D), other=0.0)
        v = tl.load(v_at + down * v_row, mask=(start + down < limit) & wanted & (dv < DV), other=0.0)
        logits = masked(add_product(q, turned_keys(k), None) * scale, mask, inside, softcap)
        p, shrink, top, total = weigh(logits, top, total)
        y = add_product(p, v, y * shrink)
        n += SPLITS * BLOCK_N
        inside = (n < limit) & seen
        mask = mask_at(mask_ptr, n, mask_column, inside)  # the next step's, which nothing waits for here
    if PDL and not EARLY:
        gdc_launch_dependents()  # not earlier: waiting programs would take room from those that read
    if CLUSTER:
        leave_to_cluster(
            y, top, total, out_ptr, pair * rows + first_row, row - first_row, rows - first_row, part, DV, SPLITS, ROWS
        )
    else:
        y, top, total = together(y, top, total)
        leave(
            y, top, total, out_ptr, sums_ptr, parts_ptr, pair * rows + row, row < rows, part, SPLITS, dv, DV
        )  # fmt: skip
