"""A few rows times a quantized weight: bound by reading the weight.

One program makes BLOCK_N outputs of every row, BLOCK_M rows in all. Each step takes CHUNKS 16-byte chunks of BLOCK_N
weight rows. A code q is seen as u = 1 + q / 2**BITS, free of conversions, and put right once a scale group:

    Σ (q - zero) x = 2**BITS Σ u x - (2**BITS + zero) Σ x

The sums differ in size by at most a few bits, so float32 loses nothing that matters (a relative 1e-6).
"""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._tiles import (
    activate,
    byte_as_float,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    power_of_two,
    tl,
    triton,
    unit_codes,
)
from qcompile.kernels._weight import Weight

MAX_ROWS = 8


def gemv(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.GemvTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) with M at most MAX_ROWS."""
    m, k = x.shape
    out = x.new_empty(m, weight.rows)
    pdl = dependent_launch(x)
    launch(
        _gemv,
        (cdiv(weight.rows, tile.rows),),
        x,
        x,
        *weight.pointers,
        bias,
        out,
        m,
        weight.rows,
        k,
        *weight.strides,
        **weight.constants,
        ACTIVATION=activation,
        EVEN=k % (tile.chunks * weight.step) == 0,
        BLOCK_M=power_of_two(m),
        BLOCK_N=tile.rows,
        CHUNKS=tile.chunks,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


@triton.jit
def _gemv(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    FIELDS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BITS: tl.constexpr = P0 + P1 + P2
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # Tiles have the axes (row of x, row of the weight, chunk, word).
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)[None, :, None]
    m = tl.arange(0, BLOCK_M)[:, None]
    chunks = tl.arange(0, CHUNKS)
    word = tl.arange(0, 4)[None, None, None, :]
    data = data_ptr + (n * (data_stride * 4))[:, :, :, None]
    scale_row = scale_ptr + n * scale_stride
    zero_row = zero_ptr + n * zero_stride if zero_ptr is not None else None
    if GROUP == 0 and zero_ptr is not None:
        shift = tl.load(zero_row).to(tl.float32) + (1 << BITS)
    # Fields that surely share a scale: all, or those of the largest power of two that divides the group.
    SHARING: tl.constexpr = FIELDS if GROUP == 0 else min(FIELDS, (GROUP // 16) & -(GROUP // 16))
    acc = tl.zeros((BLOCK_M, BLOCK_N, CHUNKS), tl.float32)
    for start in tl.range(0, tl.cdiv(K, FIELDS * 16), CHUNKS):
        chunk = start + chunks
        for first in tl.static_range(0, FIELDS, SHARING):
            part = tl.zeros((BLOCK_M, BLOCK_N, CHUNKS, 4), tl.float32)
            x_sum = tl.zeros((BLOCK_M, 1, CHUNKS, 4), tl.float32)
            for field in tl.static_range(first, first + SHARING):
                unit = chunk * FIELDS + field
                mask = None if EVEN else (unit * 16 < K)[None, None, :, None]
                codes = unit_codes(data, K, chunk[None, None, :, None], word, mask, field, FIELDS, P0, P1, P2)
                k = tl.reshape(unit[:, None] * 16 + tl.arange(0, 16)[None, :], (1, CHUNKS * 16))
                x_mask = m < M if EVEN else (m < M) & (k < K)
                x = tl.load(x_ptr + m * K + k, mask=x_mask, other=0.0)
                x = tl.reshape(x, (BLOCK_M, 1, CHUNKS, 4, 2, 2))
                even, odd = tl.split(x)
                x0, x2 = tl.split(even)
                x1, x3 = tl.split(odd)
                for byte in tl.static_range(4):
                    xb = (x0 if byte == 0 else x1 if byte == 1 else x2 if byte == 2 else x3).to(tl.float32)
                    part = tl.fma(*tl.broadcast(byte_as_float(codes, byte, BITS), xb), part)
                    x_sum += xb
            part = tl.sum(part, 3) * (1 << BITS)
            x_sum = tl.sum(x_sum, 3)
            if GROUP == 0:
                if zero_ptr is None:
                    shift = (1 << BITS) + OFFSET
                acc += part - shift * x_sum
            else:
                group = (tl.minimum((chunk * FIELDS + first) * 16, K - 1) // GROUP)[None, None, :]
                scale = tl.load(scale_row + group).to(tl.float32)
                if zero_ptr is None:
                    shift = (1 << BITS) + OFFSET
                else:
                    shift = tl.load(zero_row + group).to(tl.float32) + (1 << BITS)
                acc += scale * (part - shift * x_sum)
    y = tl.sum(acc, 2)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = column < N
    if GROUP == 0:
        y *= tl.load(scale_ptr + tl.minimum(column, N - 1).to(tl.int64) * scale_stride).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = activate(y, ACTIVATION)
    tl.store(out_ptr + m * N + column, y.to(out_ptr.dtype.element_ty), mask=inside & (m < M))
