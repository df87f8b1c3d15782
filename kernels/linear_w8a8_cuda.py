"""linear_w8a8 on CUDA: many rows by torch's products of 8-bit codes, a few by our linear on rounded x.

Codes of x are made by torch code that fuses with what comes before. Our codes of an i8 weight start at 0: a slab of
them at a time, which stays in the L2 cache, is made signed. Floats are multiplied as they lie.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import _tuning, linear_cuda
from qcompile.kernels._tiles import (
    INTERPRET,
    activate,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    tl,
    triton,
)
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import opaque
from qcompile.quant.activation import ActivationSpec, activation_codes

MIN_ROWS = 17  # torch's _int_mm takes no fewer
FINISH_BLOCK = 1024


def refuses(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> str | None:
    """Why this kernel cannot run the call, or None."""
    if not spec.endswith(("/row/sym", "/tensor/sym")) or not spec.startswith(("i8", "fp8_e4m3")):
        return f"{spec}: multiplies codes of i8 and fp8_e4m3 with a scale per row or for all"
    if reason := linear_cuda.refuses(x, data, scale, zero, bias, spec, activation):
        return reason
    if not spec.startswith("fp8"):
        return None
    if x.dtype == torch.float32:
        return "tensor cores add products of fp8 in fewer bits than float32 has"
    if not INTERPRET and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "products of fp8 need a GPU of compute capability 8.9"
    return None


def _fake(codes: Tensor, step: Tensor, data: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], data.shape[0]), dtype=rest[-1])


@opaque(_fake)
def linear_codes_cuda(
    codes: Tensor,
    step: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    columns, outputs = codes.shape[-1], data.shape[0]
    shape = (*codes.shape[:-1], outputs)
    rows = codes.reshape(-1, columns).contiguous()
    bias = None if bias is None else bias.contiguous()
    # What torch multiplies comes in sixteens.
    if rows.shape[0] < MIN_ROWS or columns % 16 or outputs % 16:
        x = (codes.to(torch.float32) * step).to(dtype)
        return linear_cuda.linear_cuda(x, data, scale, None, bias, spec, activation)
    step, scale = step.reshape(-1).contiguous(), scale.reshape(-1).to(torch.float32)
    out = codes.new_empty((rows.shape[0], outputs), dtype=dtype)
    if spec.startswith("fp8"):
        one = step.new_ones(())
        weight = data.view(torch.float8_e4m3fn).t()
        sums = torch.ops.aten._scaled_mm.default(rows, weight, one, one, out_dtype=torch.float32)
        finish(sums, step, scale, bias, out, activation)
        return out.reshape(shape)
    slab = max(1, _tuning.SLAB_ELEMENTS // columns // 16) * 16
    for first in range(0, outputs, slab):
        part = slice(first, min(first + slab, outputs))
        sums = torch.ops.aten._int_mm.default(rows, data[part].bitwise_xor(0x80).view(torch.int8).t())
        scales, biases = scale if scale.shape[0] == 1 else scale[part], None if bias is None else bias[part]
        finish(sums, step, scales, biases, out[:, part], activation)
    return out.reshape(shape)


@linear_w8a8.implementation("codes", refuses)
def linear_w8a8_cuda(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> Tensor:
    codes, step = activation_codes(x, x_scale, ActivationSpec.parse(rounding))
    return linear_codes_cuda(codes, step, data, scale, bias, spec, activation, x.dtype)


def finish(sums: Tensor, step: Tensor, scale: Tensor, bias: Tensor | None, out: Tensor, activation: str | None) -> None:
    """out = act(sums * step by row * scale by column + bias), for sums (M, N); steps and scales may be one for all."""
    (m, n) = sums.shape
    launch(
        _finish,
        (m, cdiv(n, FINISH_BLOCK)),
        sums,
        step,
        scale,
        bias,
        out,
        n,
        sums.stride(0),
        out.stride(0),
        int(step.shape[0] > 1),
        int(scale.shape[0] > 1),
        ACTIVATION=activation,
        BLOCK=FINISH_BLOCK,
        PDL=dependent_launch(out),
    )


@triton.jit
def _finish(
    sums_ptr, step_ptr, scale_ptr, bias_ptr, out_ptr, N, sums_stride, out_stride, step_stride, scale_stride,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    y = tl.load(sums_ptr + m * sums_stride + n, mask=inside, other=0).to(tl.float32) * tl.load(
        step_ptr + m * step_stride
    )
    y *= tl.load(scale_ptr + n * scale_stride, mask=inside, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * out_stride + n, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside)
