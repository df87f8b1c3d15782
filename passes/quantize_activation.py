"""Linears of rounded activations and packed weights, both of 8-bit integers, become linears of codes.

    x' = round_activation(x, "i8/token/dynamic")
    y = qcompile.linear(x', W as i8/row/sym)           ->        y = qcompile.linear_int8(x, W)

Why: integers are multiplied as integers, which processors do faster than floats; x' never exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import writers
from qcompile.graph.match import Miss, is_call
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear import linear
from qcompile.ops.linear_int8 import linear_int8
from qcompile.quant.activation import ActivationSpec


@dataclass(frozen=True)
class RoundedLinear:
    linear: Node
    rounding: Node


class QuantizeActivation:
    name = "quantize_activation"

    def match(self, node: Node) -> RoundedLinear | Miss | None:
        if not is_call(node, linear.overload) or not is_call(node.args[0], round_activation.overload):
            return None
        rounded: Any = node.args[0]
        rounding = ActivationSpec.parse(rounded.args[3])
        if node.args[5] not in ("i8/row/sym", "i8/tensor/sym") or rounding.element.tag != "i8":
            return None
        if rounding.group or rounding.outliers is not None:
            return None
        if any(rounded < writer < node for writer in writers(rounded.args[0])):
            return Miss("x is written between its rounding and the linear", node)
        return RoundedLinear(node, rounded)

    def rewrite(self, g: Rewriter, m: RoundedLinear) -> None:
        x, x_scale, _, rounding = m.rounding.args
        _, data, scale, _, bias, spec, activation = m.linear.args
        with g.before(m.linear):
            new = g.call(linear_int8.overload, x, x_scale, rounding, data, scale, bias, spec, activation)
        g.replace(m.linear, new)
