"""Rotary embedding. One program turns a few positions of one head: both halves at once, with strides as they are."""

from __future__ import annotations

from torch import Tensor

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
    triton,
)
from qcompile.ops.registry import opaque
from qcompile.ops.rope import rope

BLOCK_ELEMENTS = 512


def refuses(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if x.dim() > 4:
        return f"handles up to 4 dimensions, x has {x.dim()}"
    if x.shape[-1] % 2:
        return f"the last dimension must be even, not {x.shape[-1]}"
    if max(cos.dim(), sin.dim()) > x.dim():
        return "cos and sin have more dimensions than x"
    for tensor in (x, cos, sin):
        if reason := refuses_device(tensor, tensor.dtype):
            return reason
    return None


@opaque(lambda x, cos, sin: x.new_empty(x.shape))
def rope_cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    parts = [x[(None,) * (4 - x.dim())]]
    parts += [part.expand(x.shape)[(None,) * (4 - x.dim())] for part in (cos, sin)]
    batch, heads, length, n = parts[0].shape
    block_n = power_of_two(n // 2)
    block_m = min(power_of_two(length), max(1, BLOCK_ELEMENTS // block_n))
    launch(
        _rope,
        (batch * heads * cdiv(length, block_m),),
        *parts,
        out,
        heads,
        length,
        *(stride for part in parts for stride in part.stride()),
        HALF=n // 2,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PDL=dependent_launch(x),
        num_warps=max(1, min(4, block_m * block_n // 128)),
    )
    return out


@rope.implementation("triton", refuses)
def rope_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope_cuda(x, cos, sin)


@triton.jit
def _half(ptr, batch, head, position, column, batch_stride, head_stride, stride, column_stride, inside):
    at = batch * batch_stride.to(tl.int64) + head * head_stride.to(tl.int64) + position.to(tl.int64) * stride
    return tl.load(ptr + at + column * column_stride, mask=inside, other=0.0).to(tl.float32)


@launched
def _rope(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, length, x0, x1, x2, x3, c0, c1, c2, c3, s0, s1, s2, s3,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks = tl.cdiv(length, BLOCK_M)
    position = (tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    slice = tl.program_id(0) // blocks
    b, h = slice // heads, slice % heads
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = (position < length) & (column < HALF)
    low = _half(x_ptr, b, h, position, column, x0, x1, x2, x3, inside)
    high = _half(x_ptr, b, h, position, column + HALF, x0, x1, x2, x3, inside)
    cos_low = _half(cos_ptr, b, h, position, column, c0, c1, c2, c3, inside)
    cos_high = _half(cos_ptr, b, h, position, column + HALF, c0, c1, c2, c3, inside)
    sin_low = _half(sin_ptr, b, h, position, column, s0, s1, s2, s3, inside)
    sin_high = _half(sin_ptr, b, h, position, column + HALF, s0, s1, s2, s3, inside)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    at = (slice.to(tl.int64) * length + position) * (HALF * 2) + column
    tl.store(out_ptr + at, (low * cos_low - high * sin_low).to(DTYPE), mask=inside)
    tl.store(out_ptr + at + HALF, (high * cos_high + low * sin_high).to(DTYPE), mask=inside)
