"""rms_norm and layer_norm, with and without the residual add. One program takes a few whole rows, each read once."""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._tiles import (
    as_rows,
    cdiv,
    dependent_launch,
    fetch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    refuses_device,
    row_offset,
    tl,
    triton,
)
from qcompile.kernels._tuning import Device
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qcompile.ops.registry import opaque

MAX_COLUMNS = 65536
BLOCK_ELEMENTS = 2048


def _refuses(x: Tensor, *others: Tensor | None) -> str | None:
    for other in (x, *others):
        if other is not None and (reason := refuses_device(other, other.dtype)):
            return reason
    if x.shape[-1] > MAX_COLUMNS:
        return f"handles rows of up to {MAX_COLUMNS} elements, not {x.shape[-1]}"
    return None


def _refuses_sum(x: Tensor, residual: Tensor, *others: Tensor | None) -> str | None:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        return "x and residual differ in shape or dtype"
    return _refuses(x, *others)


def refuses_rms(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> str | None:
    return _refuses(x, weight)


def refuses_add_rms(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> str | None:
    return _refuses_sum(x, residual, weight)


def refuses_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _refuses(x, weight, bias)


def refuses_add_layer(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    return _refuses_sum(x, residual, weight, bias)


def _dense(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@opaque(lambda x, weight, eps, weight_offset: _dense(x))
def rms_norm_cuda(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    return _run(_rms_norm, x, None, (weight,), eps, OFFSET=weight_offset)[0]


@opaque(lambda x, residual, weight, eps, weight_offset: (_dense(x), _dense(x)))
def add_rms_norm_cuda(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return _run(_rms_norm, x, residual, (weight,), eps, OFFSET=weight_offset)


@opaque(lambda x, weight, bias, eps: _dense(x))
def layer_norm_cuda(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return _run(_layer_norm, x, None, (weight, bias), eps)[0]


@opaque(lambda x, residual, weight, bias, eps: (_dense(x), _dense(x)))
def add_layer_norm_cuda(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _run(_layer_norm, x, residual, (weight, bias), eps)


@rms_norm.implementation("triton", refuses_rms)
def rms_norm_triton(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    return rms_norm_cuda(x, weight, eps, weight_offset)


@add_rms_norm.implementation("triton", refuses_add_rms)
def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return add_rms_norm_cuda(x, residual, weight, eps, weight_offset)


@layer_norm.implementation("triton", refuses_layer)
def layer_norm_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return layer_norm_cuda(x, weight, bias, eps)


@add_layer_norm.implementation("triton", refuses_add_layer)
def add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return add_layer_norm_cuda(x, residual, weight, bias, eps)


def _run(
    kernel, x: Tensor, residual: Tensor | None, parameters: tuple[Tensor | None, ...], eps: float, **constants: float
) -> tuple[Tensor, Tensor]:
    """(normed, sum); the sum is empty without a residual."""
    out = _dense(x)
    total = _dense(x) if residual is not None else x.new_empty(0)
    columns = x.shape[-1]
    if x.numel() == 0:
        return out, total
    x, rows, *strides = as_rows(x)
    residual_strides = [1, 0, 0]
    if residual is not None:
        residual, _, *residual_strides = as_rows(residual)
    columns_block = power_of_two(columns)
    rows_block = min(power_of_two(rows), max(1, BLOCK_ELEMENTS // columns_block))
    programs = cdiv(rows, rows_block)
    # Few programs fetch and read parameters before the sum, behind which threads wait for one another; of many that is
    # slower. µs so | not so, rows of 4096 with a residual, H100: 1 row 1.4 | 1.6, 16 1.5 | 1.7, 128 2.9 | 2.3, 2048
    # 38.7 | 23.9.
    early = 4 * programs <= Device.of(x.device).processors
    launch(
        kernel,
        (programs,),
        x,
        residual,
        *(None if parameter is None else parameter.contiguous() for parameter in parameters),
        out,
        total if residual is not None else None,
        rows,
        columns,
        *strides,
        *residual_strides,
        eps,
        **constants,
        BLOCK_M=rows_block,
        BLOCK_N=columns_block,
        EARLY=early,
        PDL=dependent_launch(x),
        num_warps=max(1, min(16, rows_block * columns_block // 512)),
    )
    return out, total


@triton.jit
def _fetch(ptr, columns, BLOCK_N: tl.constexpr):
    """Begin to bring a parameter to the L2 cache, if there is one: right even while the kernel ahead writes to it."""
    if ptr is not None:
        LINE: tl.constexpr = 128 // (ptr.dtype.element_ty.primitive_bitwidth // 8)
        column = tl.arange(0, (BLOCK_N + LINE - 1) // LINE) * LINE
        fetch((ptr + column).to(tl.int64), column < columns)


@launched
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, columns, x_inner, x_outer_stride, x_inner_stride,
    r_inner, r_outer_stride, r_inner_stride, eps,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        if EARLY:
            _fetch(weight_ptr, columns, BLOCK_N)
        gdc_wait()
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (column < columns)
    weight = None
    if EARLY and weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)
    x = tl.load(x_ptr + row_offset(row, x_inner, x_outer_stride, x_inner_stride) + column, mask=inside, other=0.0)
    at = row.to(tl.int64) * columns + column
    if residual_ptr is not None:
        r = tl.load(residual_ptr + row_offset(row, r_inner, r_outer_stride, r_inner_stride) + column, mask=inside)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=inside)
        x = tl.where(inside, x, 0.0)
    y = x.to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 1)[:, None] / columns + eps)
    if weight_ptr is not None:
        if not EARLY:
            weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)
        y *= weight.to(tl.float32) + OFFSET
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@launched
def _layer_norm(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, rows, columns, x_inner, x_outer_stride,
    x_inner_stride, r_inner, r_outer_stride, r_inner_stride, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        if EARLY:
            _fetch(weight_ptr, columns, BLOCK_N)
            _fetch(bias_ptr, columns, BLOCK_N)
        gdc_wait()
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (row < rows) & (column < columns)
    weight, bias = None, None
    if EARLY and weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)
    if EARLY and bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0)
    x = tl.load(x_ptr + row_offset(row, x_inner, x_outer_stride, x_inner_stride) + column, mask=inside, other=0.0)
    at = row.to(tl.int64) * columns + column
    if residual_ptr is not None:
        r = tl.load(residual_ptr + row_offset(row, r_inner, r_outer_stride, r_inner_stride) + column, mask=inside)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=inside)
        x = tl.where(inside, x, 0.0)
    y = x.to(tl.float32)
    y = tl.where(inside, y - tl.sum(y, 1)[:, None] / columns, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 1)[:, None] / columns + eps)
    if weight_ptr is not None:
        if not EARLY:
            weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0)
        y *= weight.to(tl.float32)
    if bias_ptr is not None:
        if not EARLY:
            bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0)
        y += bias.to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
