"""Attention of many query rows under a mask, as of prompts: `_survey` of the mask by blocks, then `_prompt`.

Torch's attention reads a mask whole, and takes every key of a cache that a prompt fills only in part. Here blocks that
nobody attends to are left out, and where all attend to all, which is nearly everywhere else, no mask is read: causal
masks, windows and padding are found in the mask itself, for all heads at once. (Dao et al. 2022 and 2023,
flash-attention; Dong et al. 2024, FlexAttention's block masks.) On Hopper, attention_wgmma makes the most of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_decode, attention_wgmma
from qcompile.kernels._attention import capped, is_attended
from qcompile.kernels._attention_parts import combine, leave, partial_results
from qcompile.kernels._tiles import (
    cdiv,
    constexpr,
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
from qcompile.ops.attention import attention
from qcompile.ops.registry import known, opaque
from qcompile.ops.row_codes import dequantize_rows

LOG2_E = constexpr(1.4426950408889634)


def refuses(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    if mask is None and softcap is None:
        return "leaves attention without a mask to torch"
    if is_causal:
        return "handles a mask, not is_causal"
    if not scale > 0:
        return f"handles a positive scale, not {scale}"
    if reason := refuses_device(query, query.dtype):
        return reason
    if key_scale is None and not query.dtype == key.dtype == value.dtype:
        return "query, key and value differ in dtype"
    if _tile(query, value) is None:
        return f"has no tile for {query.dtype} heads of {query.shape[3]} and {value.shape[3]} columns on this GPU"
    return None


def _tile(query: Tensor, value: Tensor) -> _attention_tiles.AttentionTile | None:
    widths = known(query.shape[3]), known(value.shape[3])
    if None in widths:
        return None
    columns = power_of_two(max(width or 0 for width in widths))
    return _attention_tiles.prompt_tile(columns, query.itemsize, _tuning.Device.of(query.device))


def _result(query: Tensor, value: Tensor) -> Tensor:
    """Heads of a token side by side in memory, as the layer behind it reads them."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)


@opaque(lambda query, key, value, *others: _result(query, value))
def attention_prompt_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    if query.shape[2] <= attention_decode.MAX_LENGTH:  # known only now
        few = attention_decode.attend(query, key, value, mask, scale, softcap=softcap)
        return _result(query, value).copy_(few)
    return attend(query, key, value, mask, scale, softcap)


@attention.implementation("triton_prompt", refuses)
def attention_prompt(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if key_scale is not None and value_scale is not None:
        key = dequantize_rows.meaning(key, key_scale, query.dtype)
        value = dequantize_rows.meaning(value, value_scale, query.dtype)
    return attention_prompt_cuda(query, key, value, mask, scale, softcap)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None,
    tile: _attention_tiles.AttentionTile | None = None,
) -> Tensor:  # fmt: skip
    """The op without is_causal, by the tile that is given or else chosen."""
    batch, heads, length, width = query.shape
    kv_heads, keys, value_width = *key.shape[1:3], value.shape[3]
    out = _result(query, value)
    if out.numel() == 0 or keys == 0:
        return out.zero_()
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if tile is None and mask is not None and attention_wgmma.refuses(query, key, value, softcap) is None:
        mask = mask.expand(batch, heads, length, keys)
        survey = _surveyed(query, mask, attention_wgmma.ROWS, attention_wgmma.KEYS)
        attention_wgmma.attend(query, key, value, mask, survey, scale, out)
        return out
    if tile is None:
        tile = _tile(query, value)
        assert tile is not None
        programs, device = batch * heads * cdiv(length, tile.rows), _tuning.Device.of(query.device)
        tile = replace(tile, splits=_attention_tiles.prompt_splits(programs, cdiv(keys, tile.keys), device))
    blocks = cdiv(length, tile.rows), cdiv(keys, tile.keys)
    survey, mask_strides = None, [0, 0, 0, 0]
    if mask is not None:
        mask = mask.expand(batch, heads, length, keys)
        survey, mask_strides = _surveyed(query, mask, tile.rows, tile.keys), mask.stride()
    splits = tile.splits
    sums = parts = None
    if splits > 1:
        sums, parts = partial_results(query, batch * heads * length, splits, value_width)
    launch(
        _prompt,
        (batch * heads, splits, blocks[0]),
        query,
        key,
        value,
        mask,
        survey,
        out,
        sums,
        parts,
        heads,
        heads // kv_heads,
        length,
        keys,
        scale,
        softcap,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *mask_strides,
        *([0, 0] if survey is None else [n if size > 1 else 0 for n, size in zip(survey.stride(), survey.shape[:2])]),
        D=width,
        DV=value_width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=max(16, power_of_two(width)),
        BLOCK_DV=max(16, power_of_two(value_width)),
        BLOCKS=power_of_two(blocks[1]),
        PDL=dependent_launch(query),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if sums is not None and parts is not None:
        combine(sums, parts, out)
    return out


def _surveyed(query: Tensor, mask: Tensor, rows: int, keys: int) -> Tensor:
    """What `_survey` finds in each block of so many rows and keys of an expanded mask: i8[batch or 1, heads or 1]."""
    batch, heads = (size if stride else 1 for size, stride in zip(mask.shape[:2], mask.stride()[:2]))
    blocks = cdiv(mask.shape[2], rows), cdiv(mask.shape[3], keys)
    survey = torch.empty(batch, heads, *blocks, dtype=torch.int8, device=mask.device)
    launch(
        _survey,
        (*blocks, batch * heads),
        mask,
        survey,
        heads,
        *mask.shape[2:],
        *mask.stride(),
        BLOCK_M=rows,
        BLOCK_N=keys,
        PDL=dependent_launch(query),
        num_warps=4,
    )
    return survey


@launched
def _survey(
    mask_ptr, survey_ptr, heads, length, keys, mask_batch, mask_head, mask_row, mask_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """0 where no row of a block attends to a key of another, 2 where all do to all of them, without a bias, else 1."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(2).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask_ptr += pair // heads * mask_batch + pair % heads * mask_head
    at = m.to(tl.int64) * mask_row + n.to(tl.int64) * mask_column
    inside = (m < length) & (n < keys)
    mask = tl.load(mask_ptr + at, mask=inside, other=0)
    attended = is_attended(mask) & inside
    plain = attended if mask.dtype == tl.int1 else attended & (mask == 0.0)
    any_one = tl.max(tl.max(attended.to(tl.int32), 1), 0)
    # Rows behind the last one attend to everything: nobody looks at what they find.
    every_one = tl.min(tl.min((plain | (m >= length)).to(tl.int32), 1), 0)
    place = (pair * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(survey_ptr + place, any_one + (any_one & every_one))  # type: ignore[operator]


@triton.jit
def _step(
    q, y, top, total, block, k_ptr, v_ptr, mask_ptr, row, length, keys, scale, softcap, k_row, v_row, mask_column,
    d, dv, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The sums with one more block of keys; if WHOLE, all rows attend to all of them."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    down, across = n[:, None].to(tl.int64), n[None, :].to(tl.int64)
    inside = d < D if WHOLE else (down < keys) & (d < D)
    k = tl.load(k_ptr + down * k_row, mask=inside, other=0.0)
    inside = dv < DV if WHOLE else (down < keys) & (dv < DV)
    v = tl.load(v_ptr + down * v_row, mask=inside, other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    # Powers of two are what the hardware has.
    if WHOLE and softcap is None:
        base = tl.maximum(top, tl.max(logits, 1, keep_dims=True) * scale)
        new_top = base
        p = tl.exp2(logits * (scale * LOG2_E) - base * LOG2_E)
    else:
        logits = logits * scale if softcap is None else capped(logits * scale, softcap)
        if not WHOLE:
            seen = across < keys
            if mask_ptr is not None:
                seen &= row < length
                mask = tl.load(mask_ptr + across * mask_column, mask=seen, other=0)
                seen &= is_attended(mask)
                if mask.dtype != tl.int1:
                    logits += mask.to(tl.float32)
            logits = tl.where(seen, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1, keep_dims=True))
        # While nothing is attended the top is -inf, and -inf less -inf is no number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        # The difference first: a mask may be the lowest number there is.
        p = tl.exp2((logits - base) * LOG2_E)
    shrink = tl.exp2((top - base) * LOG2_E)
    # Of weights before they are rounded: to read them back costs more than exponents do.
    total = total * shrink + tl.sum(p, 1, keep_dims=True)
    return tl.dot(p.to(v.dtype), v, y * shrink, input_precision="ieee"), new_top, total


@launched
def _prompt(
    q_ptr, k_ptr, v_ptr, mask_ptr, survey_ptr, out_ptr, sums_ptr, parts_ptr, heads, group, length, keys, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, survey_batch, survey_head,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
    pair = tl.program_id(0).to(tl.int64)
    batch, head = pair // heads, pair % heads
    part, splits = tl.program_id(1), tl.num_programs(1)
    # Under a causal mask the last rows have the most to do: they begin first.
    block = tl.num_programs(2) - 1 - tl.program_id(2)
    row = (block * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    d, dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
    q_ptr += batch * q_batch + head * q_head
    q = tl.load(q_ptr + row.to(tl.int64) * q_row + d, mask=(row < length) & (d < D), other=0.0)
    # Blocks of keys that count are first … end - 1; those that are whole lie together, from `whole` to `behind`.
    blocks = tl.cdiv(keys, BLOCK_N)
    if survey_ptr is not None:
        survey_ptr += batch * survey_batch + head * survey_head + block * blocks
        i = tl.arange(0, BLOCKS)
        seen = tl.load(survey_ptr + i, mask=i < blocks, other=0)
        first = tl.min(tl.where(seen > 0, i, blocks))
        end = tl.max(tl.where(seen > 0, i + 1, 0))
        whole = tl.min(tl.where(seen == 2, i, end))
        behind = tl.min(tl.where((seen != 2) & (i > whole), i, end))
    else:
        first, end, whole, behind = 0, blocks, 0, keys // BLOCK_N
    mask_ptr = (
        mask_ptr if mask_ptr is None else mask_ptr + batch * mask_batch + head * mask_head + row.to(tl.int64) * mask_row
    )
    k_ptr += batch * k_batch + head // group * k_head + d
    v_ptr += batch * v_batch + head // group * v_head + dv
    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    # The whole ones, of which a program takes its part, and then the others.
    count = tl.maximum(behind - whole, 0)  # type: ignore[operator]
    mine = count * part // splits
    for step in range(0, count * (part + 1) // splits - mine):
        y, top, total = _step(
            q, y, top, total, whole + mine + step, k_ptr, v_ptr, mask_ptr, row, length, keys, scale, softcap,
            k_row, v_row, mask_column, d, dv, D, DV, BLOCK_N, True,  # type: ignore[arg-type]
        )  # fmt: skip
    rest = tl.maximum(end - first - count, 0)  # type: ignore[operator]
    mine = rest * part // splits
    for step in range(mine, rest * (part + 1) // splits):
        at = first + step  # type: ignore[operator]
        y, top, total = _step(
            q, y, top, total, tl.where(at < whole, at, at + count), k_ptr, v_ptr, mask_ptr, row, length, keys, scale,  # type: ignore[operator]
            softcap, k_row, v_row, mask_column, d, dv, D, DV, BLOCK_N, False,  # type: ignore[arg-type]
        )  # fmt: skip
    if PDL:
        gdc_launch_dependents()  # not earlier: waiting programs would take room from those that multiply
    result = (batch * length + row) * heads + head
    leave(y, top, total, out_ptr, sums_ptr, parts_ptr, result, row < length, part, splits, dv, DV)
