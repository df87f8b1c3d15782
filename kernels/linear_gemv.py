"""A few rows times a quantized weight: bound by reading the weight.

One program makes OUTPUTS columns of every row of x, ROWS rows in all. Each step takes CHUNKS 16-byte chunks of a weight
row, one or more a thread, so every load of the weight is 16 bytes wide and x is in the same threads that need it.
"""

from __future__ import annotations

import torch
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
    scaled_for_byte,
    stack,
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
    if x.element_size() == 2 and k % 4 == 0 and x.data_ptr() % 8 == 0:
        x = x.view(torch.int64)
    launch(
        _gemv,
        (cdiv(weight.rows, tile.outputs),),
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
        ROWS=power_of_two(m),
        OUTPUTS=tile.outputs,
        CHUNKS=tile.chunks,
        PDL=dependent_launch(x),
        num_warps=tile.warps,
    )
    return out


@triton.jit
def _gemv(
    x_ptr, data_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    OFFSET: tl.constexpr, GROUP: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    FIELDS: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.program_id(0) * OUTPUTS
    zero = tl.zeros((CHUNKS,), tl.float32)
    sums = (zero,) * (OUTPUTS * ROWS)
    for start in tl.range(0, tl.cdiv(K, FIELDS * 16), CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        new = ()
        # What does not depend on both loops is written inside them, and merged by the compiler.
        for i in tl.static_range(OUTPUTS * ROWS):
            n = tl.minimum(first + i // ROWS, N - 1).to(tl.int64)
            zero_row = None if zero_ptr is None else zero_ptr + n * zero_stride
            new += (
                sums[i]
                + _dot(
                    x_ptr, tl.minimum(i % ROWS, M - 1), data_ptr + n * (data_stride * 4), scale_ptr + n * scale_stride,
                    zero_row, chunk, K, out_ptr.dtype.element_ty, OFFSET, GROUP, P0, P1, P2, FIELDS, EVEN,
                ),
            )  # fmt: skip
        sums = new
    y = tl.sum(tl.reshape(stack(sums, OUTPUTS * ROWS), (CHUNKS, OUTPUTS * ROWS)), 0)
    i = tl.arange(0, OUTPUTS * ROWS)
    n, m = first + i // ROWS, i % ROWS
    inside = n < N
    if GROUP == 0:
        y *= tl.load(scale_ptr + n.to(tl.int64) * scale_stride, mask=inside).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside).to(tl.float32)
    tl.store(out_ptr + m * N + n, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside & (m < M))


@triton.jit
def _dot(
    x_ptr, m, data, scale_ptr, zero_ptr, chunk, K, DTYPE: tl.constexpr, OFFSET: tl.constexpr, GROUP: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, FIELDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """For each chunk: Σ (code - zero) * scale * x over its codes; without the scale where a row has but one."""
    BITS: tl.constexpr = P0 + P1 + P2
    # Units that surely share a scale: all, or those of the largest power of two that divides the group.
    SHARING: tl.constexpr = FIELDS if GROUP == 0 else min(FIELDS, (GROUP // 16) & -(GROUP // 16))
    word = tl.arange(0, 4)[None, :]
    total = tl.zeros(chunk.shape, tl.float32)
    for first in tl.static_range(0, FIELDS, SHARING):
        part = tl.zeros((chunk.shape[0], 4), tl.float32)
        x_sum = tl.zeros((chunk.shape[0], 4), tl.float32)
        for field in tl.static_range(first, first + SHARING):
            k = (chunk * (FIELDS * 16) + field * 16)[:, None]
            codes = unit_codes(data, K, chunk[:, None], word, None if EVEN else k < K, field, FIELDS, P0, P1, P2)
            for byte in tl.static_range(4):
                x = _x_of_byte(x_ptr, m, k, word, K, DTYPE, byte, EVEN)
                x_sum += x
                part = tl.fma(byte_as_float(codes, byte, BITS), scaled_for_byte(x, byte, BITS), part)
        dot = tl.sum(part, 1) * (2.0**74)
        group = 0 if GROUP == 0 else tl.minimum((chunk * FIELDS + first) * 16, K - 1) // GROUP
        if zero_ptr is not None:
            dot -= tl.load(zero_ptr + group).to(tl.float32) * tl.sum(x_sum, 1)
        elif OFFSET > 0:
            dot -= OFFSET * tl.sum(x_sum, 1)
        if GROUP > 0:
            dot *= tl.load(scale_ptr + group).to(tl.float32)
        total += dot
    return total


@triton.jit
def _x_of_byte(x_ptr, m, k, word, K, DTYPE: tl.constexpr, BYTE: tl.constexpr, EVEN: tl.constexpr):
    """x[m, k + 4 * word + BYTE] in float32. x_ptr is int64 where four 16-bit elements are read at once."""
    if x_ptr.dtype.element_ty != tl.int64:
        at = k + 4 * word + BYTE
        return tl.load(x_ptr + m * K + at, mask=None if EVEN else at < K, other=None if EVEN else 0.0).to(tl.float32)
    else:
        inside = None if EVEN else k + 4 * word < K
        four = tl.load(x_ptr + m * (K // 4) + k // 4 + word, mask=inside, other=None if EVEN else 0)
        two = (four >> (BYTE // 2 * 32)).to(tl.int32)
        if DTYPE == tl.bfloat16:
            return (two << 16 if BYTE % 2 == 0 else two & -65536).to(tl.float32, bitcast=True)
        else:
            return (two >> (BYTE % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
