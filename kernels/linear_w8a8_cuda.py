"""linear_w8a8 on CUDA: many rows by products of 8-bit codes, a few by our linear on rounded x.

Codes of x are made by torch code that fuses with what comes before. Products are linear_codes' on Hopper, elsewhere
torch's, whose sums scale_sums finishes. There our codes of an i8 weight, which start at 0, are made signed first: a
slab of them at a time, which stays in the L2 cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import _tuning, _turns, linear_codes, linear_cuda
from qcompile.kernels._tiles import INTERPRET
from qcompile.kernels.scale_sums import scale_sums
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import opaque
from qcompile.quant.activation import ActivationSpec, activation_codes

MIN_ROWS = 17  # torch's _int_mm takes no fewer


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
    step = step.reshape(-1).contiguous()
    # What torch multiplies comes in sixteens.
    if rows.shape[0] < MIN_ROWS or columns % 16 or outputs % 16:
        x = rows.new_empty(rows.shape, dtype=dtype)
        if rows.numel():
            scale_sums(rows[None], step, None, None, x, None)
        return linear_cuda.linear_cuda(x, data, scale, None, bias, spec, activation).reshape(shape)
    scale = scale.reshape(-1).contiguous()
    if linear_codes.refuses(rows, data, dtype) is None:
        integers, device = rows.dtype == torch.int8, _tuning.Device.of(rows.device)
        tile = _turns.product_tile(rows.shape[0], outputs, columns, integers, device)
        return linear_codes.multiply_codes(rows, step, data, scale, bias, activation, dtype, tile).reshape(shape)
    return _by_torch(rows, step, data, scale, bias, activation, dtype).reshape(shape)


def _by_torch(
    rows: Tensor,
    step: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    (count, columns), outputs = rows.shape, data.shape[0]
    out = rows.new_empty((count, outputs), dtype=dtype)
    if rows.dtype == torch.float8_e4m3fn:
        one = step.new_ones(())
        sums = torch.ops.aten._scaled_mm.default(rows, data.view(rows.dtype).t(), one, one, out_dtype=torch.float32)
        scale_sums(sums[None], step, scale, bias, out, activation)
        return out
    slab = max(1, _tuning.SLAB_ELEMENTS // columns // 16) * 16
    for first in range(0, outputs, slab):
        part = slice(first, min(first + slab, outputs))
        sums = torch.ops.aten._int_mm.default(rows, data[part].bitwise_xor(0x80).view(torch.int8).t())
        scales, biases = scale if scale.shape[0] == 1 else scale[part], None if bias is None else bias[part]
        scale_sums(sums[None], step, scales, biases, out[:, part], activation)
    return out


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
