"""linear on CUDA: the number of rows, known only at the call, decides which way it goes (see _tuning.way).

A few rows are bound by reading the weight (linear_dot and linear_few for integers, linear_gemv for all), more keep the
tensor cores busy with codes unpacked on the way (linear_mma for integers, linear_gemm), and many are fastest as a float
weight, written once and multiplied by cuBLAS.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import can_read
from qcompile.kernels._tiles import refuses_device
from qcompile.kernels._weight import Weight, refuses_weight
from qcompile.kernels.dequantize_gpu import write_weight
from qcompile.kernels.linear_dot import Around, dot
from qcompile.kernels.linear_few import can_sum, few
from qcompile.kernels.linear_gemm import gemm
from qcompile.kernels.linear_gemv import gemv
from qcompile.kernels.linear_mma import mma
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.ops.precision import wide
from qcompile.ops.registry import opaque


def refuses(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> str | None:
    """Why the Triton kernels cannot run this call, or None."""
    if activation is not None and activation not in ACTIVATIONS:
        return f"does not know the activation {activation}"
    return refuses_device(x, x.dtype) or refuses_weight(scale, zero, spec, x.shape[-1])


@opaque(linear.fake)
def linear_cuda(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    columns = x.shape[-1]
    shape = (*x.shape[:-1], data.shape[0])
    if x.numel() == 0 or data.numel() == 0:
        return linear.meaning(x, data, scale, zero, bias, spec, activation)
    rows = x.reshape(-1, columns).contiguous()
    weight = Weight.of(data, scale, zero, spec, columns)
    bias = None if bias is None else bias.contiguous()
    device = _tuning.Device.of(x.device)
    m, n, step = rows.shape[0], weight.rows, weight.step
    way = _tuning.way(m, can_read(rows, weight), step, device, can_sum(rows.dtype, weight.layout))
    if way == "dot":
        around = Around(activation=activation)
        y = dot(rows, weight, bias, around, _tuning.dot_tile(m, n, columns, step, weight.layout.bits, device))
    elif way == "few":
        y = few(rows, weight, bias, activation, _tuning.few_tile(m, n, columns, weight.layout.bits, device))
    elif way == "mma":
        y = mma(rows, weight, bias, activation, _tuning.mma_tile(m, n, columns, weight.layout.bits, device))
    elif way == "gemv":
        y = gemv(rows, weight, bias, activation, _tuning.gemv_tile(m, n, columns, step))
    elif way == "gemm":
        y = gemm(rows, weight, bias, activation, _tuning.gemm_tile(m, n, columns, step, rows.dtype, device))
    else:
        y = dequantize_and_multiply(rows, weight, bias, activation)
    return y.reshape(shape)


@linear.implementation("triton", refuses)
def linear_triton(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    return linear_cuda(x, data, scale, zero, bias, spec, activation)


def dequantize_and_multiply(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x @ W.T + bias) through a float copy of a slab of weight rows at a time, which stays in the L2 cache."""
    out = x.new_empty(x.shape[0], weight.rows)
    height = weight.layout.height
    slab = _tuning.slab_rows(weight.columns, height)
    scratch = x.new_empty(min(slab, weight.rows), weight.columns)
    for first in range(0, weight.rows, slab):
        count = min(slab, weight.rows - first)
        w, y = scratch[:count], out.narrow(1, first, count)
        write_weight(w, weight.narrow(first, count))
        if bias is None:
            torch.mm(x, w.t(), out=y)
        else:
            torch.addmm(bias.narrow(0, first, count).to(x.dtype), x, w.t(), out=y)
    if activation is None:
        return out
    return ACTIVATIONS[activation](wide(out)).to(x.dtype)
