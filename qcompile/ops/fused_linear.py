"""A linear map with what stands around it in a layer."""

from __future__ import annotations

import math

from torch import Tensor

from qcompile.ops.activation import gated_act
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear import linear
from qcompile.ops.norm import rms_norm
from qcompile.ops.registry import known, op_with_fake

FEW_ROWS = 8


def has_few_rows(x: Tensor) -> bool:
    """Are the rows of x (…, n) known, and so few that the ops around a linear matter?"""
    return 0 < math.prod(known(size) or 0 for size in x.shape[:-1]) <= FEW_ROWS


def has_known_rows(x: Tensor) -> bool:
    """Is the number of rows of x (…, n) known?"""
    return all(known(size) is not None for size in x.shape[:-1])


def _empty(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], data.shape[0] // (2 if gated else 1)))


@op_with_fake(_empty)
def fused_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float | None, weight_offset: float, data: Tensor, scale: Tensor,
    zero: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: str, activation: str | None, gated: bool,
    rounding: str | None = None,
) -> Tensor:  # fmt: skip
    """residual + linear(round_activation(rms_norm(x))), see these ops: x (…, in_features) → (…, out_features).

    Without eps there is no norm; residual (…, out_features) is None for none, and so is `rounding`, a dynamic one.
    `gated`: the weight's rows are those of a gate and as many of its factor, and the linear is gated_act of the two.
    """
    if eps is not None:
        x = rms_norm.meaning(x, norm_weight, eps, weight_offset)
    if rounding is not None:
        x = round_activation.meaning(x, None, None, rounding)
    y = linear.meaning(x, data, scale, zero, bias, spec, None if gated else activation)
    if gated:
        y = gated_act.meaning(*y.chunk(2, -1), activation)
    return y if residual is None else residual + y
