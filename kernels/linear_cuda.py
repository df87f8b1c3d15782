"""linear on CUDA: the number of rows, known only at the call, decides which way it goes (see _tables.choose).

A few rows are bound by reading the weight (linear_dot and linear_few for integers, linear_gemv for all), more keep the
tensor cores busy with codes unpacked on the way (linear_mma and linear_wgmma for integers, linear_gemm), and many are
fastest as a float weight, written once and multiplied by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.kernels import _tuning
from qcompile.kernels._gluon import can_read
from qcompile.kernels._tables import choose
from qcompile.kernels._tiles import refuses_device
from qcompile.kernels._ways import Product
from qcompile.kernels._weight import Weight, refuses_weight
from qcompile.kernels.dequantize_gpu import write_weight
from qcompile.kernels.linear_dot import Around, dot
from qcompile.kernels.linear_few import few
from qcompile.kernels.linear_gemm import gemm
from qcompile.kernels.linear_gemv import gemv
from qcompile.kernels.linear_many import many
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
    product = Product(spec, rows.shape[0], weight.rows, columns, rows.dtype, can_read(rows, weight))
    way, tile = choose(product, rows.device)
    return KERNELS[way](rows, weight, bias, activation, tile).reshape(shape)


@linear.implementation("triton", refuses)
def linear_triton(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    return linear_cuda(x, data, scale, zero, bias, spec, activation)


def _plain_dot(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.DotTile) -> Tensor:
    return dot(x, weight, bias, Around(activation=activation), tile)


def dequantize_and_multiply(
    x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: _tuning.DequantizeTile
) -> Tensor:
    """act(x @ W.T + bias) through a float copy of a slab of weight rows at a time, which stays in the L2 cache."""
    out = x.new_empty(x.shape[0], weight.rows)
    height = weight.layout.height
    slab = _tuning.slab_rows(weight.columns, height, tile.slabs)
    scratch = x.new_empty(min(slab, weight.rows), weight.columns)
    for first in range(0, weight.rows, slab):
        count = min(slab, weight.rows - first)
        w, y = scratch[:count], out.narrow(1, first, count)
        write_weight(w, weight.narrow(first, count), tile)
        if bias is None:
            torch.mm(x, w.t(), out=y)
        else:
            torch.addmm(bias.narrow(0, first, count).to(x.dtype), x, w.t(), out=y)
    if activation is None:
        return out
    return ACTIVATIONS[activation](wide(out)).to(x.dtype)


# What makes a product, by way: kernel(x, weight, bias, activation, tile).
KERNELS: dict[str, Callable[..., Tensor]] = {
    "dot": _plain_dot,
    "few": few,
    "mma": mma,
    "wgmma": many,
    "gemv": gemv,
    "gemm": gemm,
    "dequantize": dequantize_and_multiply,
}
