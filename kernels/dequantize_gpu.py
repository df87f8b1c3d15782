"""The float weight behind packed codes. One program writes a tile of BLOCK_N rows and CHUNKS chunks of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._tiles import (
    FLOATS,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    refuses_device,
    tl,
    triton,
    unit_weights,
)
from qcompile.kernels._weight import Weight, refuses_weight
from qcompile.ops.linear import dequantize
from qcompile.ops.registry import opaque


def refuses(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> str | None:
    """Why this kernel cannot write the weight, or None."""
    if dtype not in FLOATS:
        return f"writes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return refuses_device(data, dtype) or refuses_weight(scale, zero, spec, shape[-1])


@opaque(dequantize.fake)
def dequantize_cuda(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    out = data.new_empty((math.prod(shape[:-1]), shape[-1]), dtype=dtype)
    if out.numel():
        weight = Weight.of(data, scale, zero, spec, shape[-1])
        write_weight(out, weight)
    return out.reshape(shape)


@dequantize.implementation("triton", refuses)
def dequantize_triton(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return dequantize_cuda(data, scale, zero, spec, shape, dtype)


def write_weight(out: Tensor, weight: Weight, tile: _tuning.DequantizeTile | None = None) -> None:
    """Fill contiguous `out` (rows, columns) with the weight."""
    tile = tile or _tuning.dequantize_tile(weight.layout.bits)
    (n, k), span = out.shape, tile.chunks * weight.step
    launch(
        _dequantize,
        (cdiv(k, span), cdiv(n, tile.outputs)),
        *weight.pointers,
        out,
        n,
        k,
        *weight.strides,
        W=weight.layout,
        EVEN=k % span == 0,
        BLOCK_N=tile.outputs,
        CHUNKS=tile.chunks,
        PDL=dependent_launch(out),
        num_warps=tile.warps,
    )


@triton.jit
def _dequantize(
    data_ptr, scale_ptr, zero_ptr, table_ptr, out_ptr, N, K, data_stride, scale_stride, zero_stride,
    W: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    data = data_ptr + row * (data_stride * 4)
    scale_row = scale_ptr + row // W.height * scale_stride
    zero_row = None if zero_ptr is None else zero_ptr + row // W.height * zero_stride
    start = tl.program_id(0) * CHUNKS
    inputs = tl.arange(0, CHUNKS * 16)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    FIELDS: tl.constexpr = W.fields
    for field in tl.static_range(FIELDS):
        chunk = start + tl.arange(0, CHUNKS)
        w = unit_weights(data, scale_row, zero_row, table_ptr, K, chunk, DTYPE, field, W, True, EVEN)
        k = ((start + inputs // 16) * (FIELDS * 16) + field * 16 + inputs % 16)[None, :]
        tl.store(out_ptr + row * K + k, w, mask=(n < N)[:, None] & (k < K))
