"""fused_linear on CUDA: of one or two rows in one launch of linear_dot, and a gate of any number of rows.

Where linear_few, linear_mma and linear_many make whole sums, they make the gate's product too; elsewhere it is a
kernel of its own.
"""

from __future__ import annotations

import math

from torch import Tensor

from qcompile.kernels import _gluon, _tuning, _turns, linear_cuda
from qcompile.kernels._gluon import can_read
from qcompile.kernels._tables import choose
from qcompile.kernels._ways import Product
from qcompile.kernels._weight import Layout, Weight
from qcompile.kernels.gated_act import gated_act_cuda
from qcompile.kernels.linear_dot import Around, dot
from qcompile.kernels.linear_few import few_gated
from qcompile.kernels.linear_many import many_gated
from qcompile.kernels.linear_mma import mma_gated
from qcompile.ops.fused_linear import fused_linear
from qcompile.ops.registry import known, opaque


def refuses(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> str | None:  # fmt: skip
    if rounding is not None:
        return f"takes no rounding of x, such as {rounding}"
    if reason := linear_cuda.refuses(x, data, scale, zero, bias, spec, activation):
        return reason
    if gated and eps is None and residual is None:
        return None
    if reason := _gluon.refuses(x, layout := Layout.of(spec)):
        return reason
    rows = math.prod(known(size) or 0 for size in x.shape[:-1])
    if not rows or _tuning.way(rows, True, 16 * layout.fields, _tuning.Device.of(x.device)) != "dot":
        return f"handles the one or two rows that linear_dot takes, not {rows or 'an unknown number'} by {spec}"
    if norm_weight is not None and norm_weight.dtype != x.dtype:
        return f"handles norms in the dtype of x, not {norm_weight.dtype}"
    return None


@opaque(fused_linear.fake)
def fused_linear_cuda(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
) -> Tensor:  # fmt: skip
    columns, shape = x.shape[-1], (*x.shape[:-1], data.shape[0] // (2 if gated else 1))
    if x.numel() == 0 or data.numel() == 0:
        return fused_linear.meaning(
            x, norm_weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated
        )
    rows = x.reshape(-1, columns).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    weight = Weight.of(data, scale, zero, spec, columns)
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    product = Product(spec, rows.shape[0], weight.rows, columns, rows.dtype, can_read(rows, weight))
    way, tile = choose(product, x.device)
    if isinstance(tile, _tuning.DotTile):
        around = Around(norm_weight, eps, weight_offset, residual, activation, gated)
        return dot(rows, weight, bias, around, tile).reshape(shape)
    assert gated and activation is not None and eps is None and residual is None
    if isinstance(tile, _tuning.MmaTile) and tile.splits == 1:
        return mma_gated(rows, weight, bias, activation, tile).reshape(shape)
    if isinstance(tile, _turns.WgmmaTile) and tile.splits == 1:
        return many_gated(rows, weight, bias, activation, tile).reshape(shape)
    if isinstance(tile, _tuning.FewTile) and tile.parts == 1:
        return few_gated(rows, weight, bias, activation, tile).reshape(shape)
    y = linear_cuda.KERNELS[way](rows, weight, bias, None, tile)
    return gated_act_cuda(*y.chunk(2, -1), activation).reshape(shape)


@fused_linear.implementation("triton", refuses, device="cuda")
def fused_linear_triton(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    return fused_linear_cuda(
        x, norm_weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated
    )
