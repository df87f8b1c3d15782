"""A linear map of codes by codes with the gate before it."""

from __future__ import annotations

from torch import Tensor

from qcompile.ops.activation import gated_act
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import op_with_fake


def _empty(gate: Tensor, up: Tensor, gate_activation: str, rounding: str, data: Tensor, *rest: object) -> Tensor:
    return gate.new_empty((*gate.shape[:-1], data.shape[0]))


@op_with_fake(_empty)
def gated_linear_w8a8(
    gate: Tensor,
    up: Tensor,
    gate_activation: str,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> Tensor:
    """linear_w8a8 of gated_act(gate, up, gate_activation), which is rounded dynamically."""
    x = gated_act.meaning(gate, up, gate_activation)
    return linear_w8a8.meaning(x, None, rounding, data, scale, zero, bias, spec, activation)
