"""fused_linear of one or two rows on CUDA, in one launch of linear_dot; a pass makes no such op of more rows."""

from __future__ import annotations

import math

from torch import Tensor

from qcompile.kernels import _gluon, _tuning, linear_cuda
from qcompile.kernels._tables import choose
from qcompile.kernels._ways import Product
from qcompile.kernels._weight import Layout, Weight
from qcompile.kernels.linear_dot import Around, dot
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
    columns = x.shape[-1]
    rows = x.reshape(-1, columns).contiguous()
    if rows.data_ptr() % 16:
        rows = rows.clone()
    weight = Weight.of(data, scale, zero, spec, columns)
    residual = None if residual is None else residual.contiguous()
    bias = None if bias is None else bias.contiguous()
    around = Around(norm_weight, eps, weight_offset, residual, activation, gated)
    _, tile = choose(Product(spec, rows.shape[0], weight.rows, columns, rows.dtype, True), x.device)
    assert isinstance(tile, _tuning.DotTile)
    return dot(rows, weight, bias, around, tile).reshape(*x.shape[:-1], -1)


@fused_linear.implementation("triton", refuses, device="cuda")
def fused_linear_triton(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    return fused_linear_cuda(
        x, norm_weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated
    )
