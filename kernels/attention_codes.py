"""Attention of few query rows over a quantized cache, as in decoding: attention_decode over codes of 8 bits.

Codes become float16 numbers, exactly, on their way to tensor cores; the scales of keys are factors of the logits, those
of values of the weights. What the next step needs is read into registers before this one is computed: asynchronous
copies would leave codes in shared memory, where values can be turned in pieces of 16 bits alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _attention_tiles, _tuning, attention_decode
from qcompile.kernels._attention import SCAN_ELEMENTS, add_product, capped, is_attended, mask_strides, seen_steps, weigh
from qcompile.kernels._attention_parts import combine, leave, partial_results
from qcompile.kernels._row_codes import SMALLEST, refuses_codes
from qcompile.kernels._tiles import (
    INTERPRET,
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

HAS_ASM = constexpr(not INTERPRET)


def refuses(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    if key_scale is None or value_scale is None:
        return "handles codes with scales"
    if reason := refuses_device(query, query.dtype):
        return reason
    for codes, scales in ((key, key_scale), (value, value_scale)):
        if reason := refuses_codes(codes, scales):
            return reason
    if any(width is None or width % 16 for width in (known(key.shape[3]), known(value.shape[3]))):
        return f"handles heads of multiples of 16 columns, not {key.shape[3]} and {value.shape[3]}"
    return attention_decode.refuses_shape(query, value, is_causal)


@opaque(lambda query, key, value, *others: query.new_empty(*query.shape[:3], value.shape[3]))
def attention_codes_cuda(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None,
    key_scale: Tensor, value_scale: Tensor,
) -> Tensor:  # fmt: skip
    return attend(query, key, value, mask, scale, softcap, key_scale, value_scale)


@attention.implementation("triton_codes", refuses)
def attention_codes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    softcap: float | None = None, key_scale: Tensor | None = None, value_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert key_scale is not None and value_scale is not None
    return attention_codes_cuda(query, key, value, mask, scale, softcap, key_scale, value_scale)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float | None,
    key_scale: Tensor, value_scale: Tensor, tile: _attention_tiles.AttentionTile | None = None,
) -> Tensor:  # fmt: skip
    """The op without is_causal, by the tile that is given or else chosen."""
    batch, heads, length, width = query.shape
    kv_heads, keys, value_width = *key.shape[1:3], value.shape[3]
    out = query.new_empty(batch, heads, length, value_width)
    if out.numel() == 0:
        return out
    if query.stride(3) != 1:
        query = query.contiguous()
    key_words, value_words = _words(key), _words(value)
    rows = heads // kv_heads * length
    block_d, block_dv = (max(16, power_of_two(n)) for n in (width, value_width))
    if tile is None:
        device = _tuning.Device.of(key.device)
        tile = _attention_tiles.codes_tile(batch * kv_heads, rows, keys, max(block_d, block_dv), query.itemsize, device)
    strides = mask_strides(mask, batch, heads, length, keys)
    mask_rows = tile.rows if any(strides[1:3]) else 1
    sums = parts = None
    if tile.splits > 1:
        sums, parts = partial_results(query, batch * heads * length, tile.splits, value_width)
    launch(
        _split_codes,
        (batch * kv_heads, tile.splits, cdiv(rows, tile.rows)),
        query,
        key_words,
        value_words,
        key_scale,
        value_scale,
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
        *(stride for x in (query, key_words, value_words) for stride in x.stride()[:3]),
        *(stride for x in (key_scale, value_scale) for stride in x.stride()[:2]),
        *strides,
        D=width,
        DV=value_width,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        MASK_ROWS=mask_rows,
        SCAN=max(16, SCAN_ELEMENTS // mask_rows),
        IS_INTEGER=key.dtype == torch.int8,
        EARLY=cdiv(keys, tile.keys * tile.splits) <= 2,
        PDL=dependent_launch(query),
        num_warps=tile.warps,
        num_stages=1,
    )
    if sums is not None and parts is not None:
        combine(sums, parts, out)
    return out


def _words(codes: Tensor) -> Tensor:
    """Codes seen as int32, of rows that begin at multiples of 16 bytes."""
    if codes.data_ptr() % 16 or any(stride % 16 for stride in codes.stride()[:3]):
        codes = codes.contiguous()
    return codes.view(torch.int32)


@triton.jit
def _numbers(words, IS_INTEGER: tl.constexpr):
    """The numbers of four codes a word in float16, side by side.

    In assembly: a conversion that Triton knows would be moved, one by one, behind the turn through shared memory.
    """
    a, b, c, d = words.to(tl.int8), (words >> 8).to(tl.int8), (words >> 16).to(tl.int8), (words >> 24).to(tl.int8)
    codes = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (words.shape[0], 4 * words.shape[1]))
    if HAS_ASM:
        if IS_INTEGER:
            # 1024 + a byte is the byte behind 0x64; a sign bit that is turned over stands for 128 more.
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 bytes, offset;
                mov.b32 offset, 0x64806480;
                xor.b32 bytes, $2, 0x80808080;
                prmt.b32 $0, bytes, 0x64646464, 0x4140;
                prmt.b32 $1, bytes, 0x64646464, 0x4342;
                sub.f16x2 $0, $0, offset;
                sub.f16x2 $1, $1, offset;
                }""",
                "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                """{
                .reg .b16 low, high;
                mov.b32 {low, high}, $2;
                cvt.rn.f16x2.e4m3x2 $0, low;
                cvt.rn.f16x2.e4m3x2 $1, high;
                }""",
                "=r,=r,r", [codes], tl.float16, is_pure=True, pack=4,
            )  # fmt: skip
    elif IS_INTEGER:
        return codes.to(tl.float16)
    else:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _in_range(q):
    """Rows by powers of two that take them to the middle of float16, and these powers."""
    top = tl.max(tl.abs(q.to(tl.float32)), 1, keep_dims=True)
    power = tl.exp2(tl.floor(tl.log2(tl.where(top == 0.0, 1.0, top))))
    y = q.to(tl.float32) / power
    return y if q.dtype == tl.float32 else y.to(tl.float16), power


@triton.jit
def _read(k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, n, inside, k_row, v_row, words, v_words):
    """Codes, four a word, and scales of keys and values."""
    down, rows = n[:, None].to(tl.int64), inside[:, None]
    k = tl.load(k_ptr + down * tl.multiple_of(k_row, 4), mask=rows & words, other=0)
    v = tl.load(v_ptr + down * tl.multiple_of(v_row, 4), mask=rows & v_words, other=0)
    k_scale = tl.load(k_scale_ptr + n[None, :], mask=inside[None, :], other=0.0)
    v_scale = tl.load(v_scale_ptr + n[None, :], mask=inside[None, :], other=0.0)
    return k, v, k_scale, v_scale


@launched
def _split_codes(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, mask_ptr, out_ptr, sums_ptr, parts_ptr, kv_heads, rows, length, keys,
    scale, softcap, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, k_scale_batch, k_scale_head,
    v_scale_batch, v_scale_head, mask_batch, mask_head, mask_row, mask_column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASK_ROWS: tl.constexpr, SCAN: tl.constexpr, IS_INTEGER: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
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
    q, power = _in_range(tl.load(q_ptr + q_at + d, mask=(row < rows) & (d < D), other=0.0))
    scale *= power
    first, end = 0, tl.cdiv(tl.cdiv(keys, BLOCK_N) - part, splits)
    seen_row = (first_row + tl.arange(0, MASK_ROWS))[:, None]
    if mask_ptr is not None:
        seen_head = kv_head * (rows // length) + seen_row // length
        mask_ptr += batch * mask_batch + seen_head * mask_head + (seen_row % length).to(tl.int64) * mask_row
        first, end, _ = seen_steps(
            mask_ptr, mask_column, seen_row < rows, part, splits, end, keys, BLOCK_N, MASK_ROWS, SCAN, ""
        )
    word, v_word = tl.arange(0, BLOCK_D // 4)[None, :], tl.arange(0, BLOCK_DV // 4)[None, :]
    k_ptr += batch * k_batch + kv_head * k_head + word
    v_ptr += batch * v_batch + kv_head * v_head + v_word
    k_scale_ptr += batch * k_scale_batch + kv_head * k_scale_head
    v_scale_ptr += batch * v_scale_batch + kv_head * v_scale_head
    steps = end - first  # type: ignore[operator]
    n = (first * splits + part) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < tl.minimum(steps, 1) * keys
    k, v, k_scale, v_scale = _read(
        k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, n, inside, k_row, v_row, word < D // 4, v_word < DV // 4
    )
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + n[None, :].to(tl.int64) * mask_column, mask=inside[None, :] & (seen_row < rows))
    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for step in range(0, steps):
        n += splits * BLOCK_N
        next_inside = n < tl.minimum(steps - 1 - step, 1) * keys
        next_k, next_v, next_k_scale, next_v_scale = _read(
            k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, n, next_inside, k_row, v_row, word < D // 4, v_word < DV // 4
        )
        turned = tl.trans(_numbers(k, IS_INTEGER))  # type: ignore[arg-type]
        logits = add_product(q, turned, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)) * (scale * k_scale)
        if softcap is not None:
            logits = capped(logits, softcap)
        seen = inside[None, :]
        if mask_ptr is not None:
            seen = seen & (seen_row < rows) & is_attended(mask)
            if mask.dtype != tl.int1:
                logits += mask.to(tl.float32)
            mask = tl.load(
                mask_ptr + n[None, :].to(tl.int64) * mask_column, mask=next_inside[None, :] & (seen_row < rows)
            )
        logits = tl.where(seen, logits, float("-inf"))
        p, shrink, top, total = weigh(logits, top, total)
        # By the largest scale of the block, as float16 would lose what is small.
        largest = tl.maximum(tl.max(v_scale, 1, keep_dims=True), SMALLEST)
        p *= v_scale * (1.0 / largest)
        if q.dtype != tl.float32:
            p = p.to(tl.float16)
        y = y * shrink + add_product(p, _numbers(v, IS_INTEGER), tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)) * largest
        k, v, k_scale, v_scale, inside = next_k, next_v, next_k_scale, next_v_scale, next_inside
    if PDL and not EARLY:
        gdc_launch_dependents()  # not earlier: waiting programs would take room from those that read
    leave(y, top, total, out_ptr, sums_ptr, parts_ptr, pair * rows + row, row < rows, part, splits, dv, DV)
