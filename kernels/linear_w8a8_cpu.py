"""linear_w8a8 of integers on the CPU: many rows by torch's product of 8-bit integers, a few by linear on rounded x.

Codes of x are made by torch code that fuses with what comes before. Our codes of the weight start at 0; a slab of them
at a time, which stays in the cache, is made signed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import linear_cpu
from qcompile.kernels._cpp import processor_features
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import opaque
from qcompile.quant.activation import ActivationSpec, activation_codes

# From this many rows on. ms of one thread, linear on rounded x | this, Zen 4:
#                         24 rows        64 rows        512 rows
# float32  8192 × 2048    15.3 | 12.5    41.7 | 22.3     380 | 104
# bfloat16 8192 × 2048     5.7 | 11.3    19.6 | 19.0     174 | 121
MIN_ROWS = {torch.float32: 24, torch.bfloat16: 64, torch.float16: 24}
SLAB_BYTES = 4 << 20
# Without one of these, sums of two products may saturate at 16 bits.
EXACT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def refuses(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> str | None:
    """Why this kernel cannot run the call, or None."""
    if not spec.startswith("i8/"):
        return f"{spec}: multiplies codes of i8"
    reason = linear_cpu.refuses(x, data, scale, None, bias, spec, activation)
    if reason is None and EXACT.isdisjoint(processor_features()):
        return "this processor has no instruction that sums products of bytes exactly"
    return reason


def _fake(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, spec: str, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], data.shape[0]), dtype=dtype)


@opaque(_fake)
def linear_codes(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, spec: str, dtype: torch.dtype
) -> Tensor:
    columns, outputs = codes.shape[-1], data.shape[0]
    rows = codes.reshape(-1, columns)
    shape = (*codes.shape[:-1], outputs)
    if rows.shape[0] < MIN_ROWS[dtype]:
        x = (codes.to(torch.float32) * step).to(dtype)
        return linear_cpu.linear_packed(x, data, scale, None, bias, spec)
    y = codes.new_empty((rows.shape[0], outputs), dtype=dtype)
    slab = max(1, SLAB_BYTES // columns)
    for first in range(0, outputs, slab):
        count = min(slab, outputs - first)
        weight = data.narrow(0, first, count).bitwise_xor(0x80).view(torch.int8)[:, :columns]
        scales = scale if scale.shape[0] == 1 else scale.narrow(0, first, count)
        part = torch.ops.aten._int_mm.default(rows, weight.t()) * step.reshape(-1, 1)
        part *= scales.to(torch.float32).t()
        if bias is not None:
            part += bias.narrow(0, first, count)
        y.narrow(1, first, count).copy_(part)
    return y.reshape(shape)


@linear_w8a8.implementation("cpu", refuses)
def linear_w8a8_cpu(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> Tensor:
    codes, step = activation_codes(x, x_scale, ActivationSpec.parse(rounding))
    y = linear_codes(codes, step, data, scale, bias, spec, x.dtype)
    return y if activation is None else ACTIVATIONS[activation](y)
