"""Linears of rounded activations and packed weights, both integers or both 8-bit floats, become linears of codes.

    x' = round_activation(x, "i8/token/dynamic")
    y = qcompile.linear(x', W as u4/g64/asym)          ->        y = qcompile.linear_w8a8(x, W)

Why: processors multiply codes of 8 bits faster than floats of 16; x' never exists. A few rows are bound by reading the
weight, and stay linears that take what stands around them, unless the weight has 8 bits and a scale per row or for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import writers
from qcompile.graph.match import Miss, is_call, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.fused_linear import has_few_rows
from qcompile.ops.linear import linear
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.quant.activation import CODES, ActivationSpec
from qcompile.quant.spec import QSpec


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
        tag, spec = rounding.element.tag, str(node.args[5])
        if tag not in CODES or rounding.group or rounding.outliers is not None:
            return None
        if spec not in (f"{tag}/row/sym", f"{tag}/tensor/sym"):
            if tag != "i8" or QSpec.parse(spec).element.is_float or has_few_rows(value(rounded)):
                return None
        if any(rounded < writer < node for writer in writers(rounded.args[0])):
            return Miss("x is written between its rounding and the linear", node)
        return RoundedLinear(node, rounded)

    def rewrite(self, g: Rewriter, m: RoundedLinear) -> None:
        x, x_scale, _, rounding = m.rounding.args
        _, *weight = m.linear.args
        with g.before(m.linear):
            new = g.call(linear_w8a8.overload, x, x_scale, rounding, *weight)
        g.replace(m.linear, new)
