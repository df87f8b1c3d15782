"""Rows times a quantized weight on tensor cores.

One program makes a BLOCK_M x BLOCK_N tile of the output. Each step takes CHUNKS 16-byte chunks of BLOCK_N weight rows,
unpacks them in registers one unit of sixteen codes a chunk at a time, and multiplies them with the inputs of those
units: the order of a sum is free, so codes are never reordered. With splits > 1 the steps are dealt out to several
programs a tile, and a second kernel adds their sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._tiles import (
    activate,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    tl,
    unit_weights,
)
from qcompile.kernels._weight import Weight

FINISH_BLOCK = 1024


def gemm(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.GemmTile) -> Tensor:
    """act(x @ W.T + bias) for contiguous x (M, K)."""
    return in_parts(_launch, x, weight, bias, activation, tile, tile.splits)


def in_parts(
    run: Callable[..., None], x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: Any,
    parts: int, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `run(x, weight, bias, out, activation, tile)` writes to `out` (M, N), or in so many parts of the inputs to
    `out` (parts, M, N), of which `finish` makes one."""
    out = x.new_empty(x.shape[0], weight.rows) if out is None else out
    if parts == 1:
        run(x, weight, bias, out, activation, tile)
    else:
        sums = x.new_empty(parts, *out.shape, dtype=torch.float32)
        run(x, weight, None, sums, None, tile)
        finish(sums, bias, out, activation)
    return out


def _launch(
    x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, activation: str | None, tile: _tuning.GemmTile
) -> None:
    (m, k), n = x.shape, weight.rows
    launch(
        _gemm,
        (cdiv(m, tile.rows) * cdiv(n, tile.outputs), tile.splits),
        x,
        *weight.pointers,
        bias,
        out,
        m,
        n,
        k,
        *weight.strides,
        W=weight.layout,
        ACTIVATION=activation,
        EVEN=k % (tile.chunks * weight.step) == 0,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        CHUNKS=tile.chunks,
        PDL=dependent_launch(x),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def finish(parts: Tensor, bias: Tensor | None, out: Tensor, activation: str | None) -> None:
    """out = act(sum of parts (splits, M, N) + bias); out may be some columns of a wider tensor."""
    m, n = out.shape
    constants = {"SPLITS": parts.shape[0], "ACTIVATION": activation, "BLOCK": FINISH_BLOCK}
    grid = (m, cdiv(n, FINISH_BLOCK))
    launch(_finish, grid, parts, bias, out, m, n, out.stride(0), **constants, PDL=dependent_launch(out))


@launched
def _gemm(
    x_ptr, data_ptr, scale_ptr, zero_ptr, table_ptr, bias_ptr, out_ptr, M, N, K, data_stride, scale_stride, zero_stride,
    W: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FIELDS: tl.constexpr = W.fields
    # Neighbouring programs share their weights.
    blocks_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    data = data_ptr + weight_row * (data_stride * 4)
    scale_row = scale_ptr + weight_row // W.height * scale_stride
    zero_row = None if zero_ptr is None else zero_ptr + weight_row // W.height * zero_stride
    x_row = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    inputs = tl.arange(0, CHUNKS * 16)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(tl.program_id(1) * CHUNKS, tl.cdiv(K, FIELDS * 16), tl.num_programs(1) * CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        for field in tl.static_range(FIELDS):
            k = ((start + inputs // 16) * (FIELDS * 16) + field * 16 + inputs % 16)[None, :]
            x = tl.load(x_row + k, mask=None if EVEN else k < K, other=None if EVEN else 0.0)
            w = unit_weights(data, scale_row, zero_row, table_ptr, K, chunk, DTYPE, field, W, False, EVEN)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if W.group == 0:
        acc *= tl.load(scale_ptr + tl.minimum(n, N - 1).to(tl.int64) * scale_stride).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1).to(tl.int64) * M + m.to(tl.int64))[:, None] * N + n[None, :]
    y = activate(acc, ACTIVATION).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=(m < M)[:, None] & (n < N)[None, :])


@launched
def _finish(
    parts_ptr, bias_ptr, out_ptr, M, N, out_row,
    SPLITS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds the sums of SPLITS programs, always in the same order."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    y = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(SPLITS):
        y += tl.load(parts_ptr + (part * M + row) * N + n, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + n, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside)
