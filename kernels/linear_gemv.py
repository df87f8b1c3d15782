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
    byte_value,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    scaled_for_byte,
    stack,
    tl,
    triton,
    unit_codes,
)
from qcompile.kernels._weight import Weight


def gemv(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.GemvTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K) with M at most 8."""
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
        W=weight.layout,
        ACTIVATION=activation,
        EVEN=k % (tile.chunks * weight.step) == 0,
        ROWS=power_of_two(m),
        OUTPUTS=tile.outputs,
        CHUNKS=tile.chunks,
        PDL=dependent_launch(x),
        num_warps=tile.warps,
    )
    return out


@launched
def _gemv(
    x_ptr, data_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    FIELDS: tl.constexpr = W.fields
    SHARING: tl.constexpr = min(4, W.sharing)  # x of more units does not fit into registers
    first = tl.program_id(0) * OUTPUTS
    sums = (tl.zeros((CHUNKS,), tl.float32),) * (OUTPUTS * ROWS)
    for start in tl.range(0, tl.cdiv(K, FIELDS * 16), CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        for field in tl.static_range(0, FIELDS, SHARING):
            xs, x_sums = _inputs(x_ptr, M, K, chunk, DTYPE, field, SHARING, W, EVEN, ROWS)
            new = ()
            for output in tl.static_range(OUTPUTS):
                n = tl.minimum(first + output, N - 1).to(tl.int64)
                scale_row = scale_ptr + n // W.height * scale_stride
                zero_row = None if zero_ptr is None else zero_ptr + n // W.height * zero_stride
                dots = _dots(
                    data_ptr + n * (data_stride * 4), scale_row, zero_row, table_ptr, xs, x_sums, chunk, K,
                    field, SHARING, W, EVEN, ROWS,
                )  # fmt: skip
                for m in tl.static_range(ROWS):
                    new += (sums[output * ROWS + m] + dots[m],)
            sums = new
    y = tl.sum(tl.reshape(stack(sums, OUTPUTS * ROWS), (CHUNKS, OUTPUTS * ROWS)), 0)
    i = tl.arange(0, OUTPUTS * ROWS)
    n, m = first + i // ROWS, i % ROWS
    inside = n < N
    if W.group == 0:
        y *= tl.load(scale_ptr + n.to(tl.int64) * scale_stride, mask=inside).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside).to(tl.float32)
    tl.store(out_ptr + m * N + n, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside & (m < M))


@triton.jit
def _inputs(
    x_ptr, M, K, chunk, DTYPE: tl.constexpr, FIRST: tl.constexpr, SHARING: tl.constexpr, W: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x at the units from FIRST on, as `scaled_for_byte`, at (unit * ROWS + row) * 4 + byte; and its sums by row."""
    word = tl.arange(0, 4)[None, :]
    xs = ()
    totals = (tl.zeros((chunk.shape[0], 4), tl.float32),) * ROWS
    for unit in tl.static_range(SHARING):
        k = (chunk * (W.fields * 16) + (FIRST + unit) * 16)[:, None]
        new = ()
        for m in tl.static_range(ROWS):
            total = totals[m]
            for byte in tl.static_range(4):
                x = _x_of_byte(x_ptr, tl.minimum(m, M - 1), k, word, K, DTYPE, byte, EVEN)
                xs += (scaled_for_byte(x, byte, W),)
                total += x
            new += (total,)
        totals = new
    sums = ()
    for m in tl.static_range(ROWS):
        sums += (tl.sum(totals[m], 1),)
    return xs, sums


@triton.jit
def _dots(
    data, scale_row, zero_row, table_ptr, xs, x_sums, chunk, K,
    FIRST: tl.constexpr, SHARING: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each row of x and each chunk: Σ weight * x over the units from FIRST on, which share a scale.

    Without the scale where a row of the weight has but one.
    """
    word = tl.arange(0, 4)[None, :]
    parts = (tl.zeros((chunk.shape[0], 4), tl.float32),) * ROWS
    for unit in tl.static_range(SHARING):
        mask = None if EVEN else ((chunk * W.fields + FIRST + unit) * 16 < K)[:, None]
        codes = unit_codes(data, K, chunk[:, None], word, mask, FIRST + unit, W)
        for byte in tl.static_range(4):
            code = byte_value(codes, table_ptr, byte, W)
            new = ()
            for m in tl.static_range(ROWS):
                new += (tl.fma(code, xs[(unit * ROWS + m) * 4 + byte], parts[m]),)
            parts = new
    group = 0 if W.group == 0 else tl.minimum((chunk * W.fields + FIRST) * 16, K - 1) // W.group
    scale = 1.0 if W.group == 0 else tl.load(scale_row + group).to(tl.float32)
    zero = W.offset * 1.0 if zero_row is None else tl.load(zero_row + group).to(tl.float32)
    dots = ()
    for m in tl.static_range(ROWS):
        dot = tl.sum(parts[m], 1) * 2.0**74
        dots += (dot * scale + zero * x_sums[m] if W.added else scale * (dot - zero * x_sums[m]),)
    return dots


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
        if DTYPE == tl.bfloat16:  # noqa: SIM300
            return (two << 16 if BYTE % 2 == 0 else two & -65536).to(tl.float32, bitcast=True)
        else:
            return (two >> (BYTE % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
