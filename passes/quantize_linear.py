"""Linears whose weight is unpacked from codes become quantized linears.

    w = dequantize(codes, scale, zero)
    y = linear(x, w, bias)                   ->        y = qcompile.linear(x, codes, scale, zero, bias)

Where the columns are stored in an order of their own (`reorder(w, order)`), x is brought into that order instead.

Why: the float weight never exists; decode reads 4 bits a weight instead of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from qcompile.graph.match import Miss, argument, aten, is_call, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.linear import dequantize, linear, reorder


@dataclass(frozen=True)
class UnpackedLinear:
    linear: Node
    x: Node
    weight: Node
    order: Node | None
    bias: Node | None


class QuantizeLinear:
    name = "quantize_linear"

    def match(self, node: Node) -> UnpackedLinear | Miss | None:
        if not is_call(node, aten.linear.default):
            return None
        x, weight, bias = (argument(node, index, name) for index, name in enumerate(("input", "weight", "bias")))
        order = None
        if is_call(weight, reorder.overload):
            weight, order = weight.args
        if not is_call(weight, dequantize.overload):
            return None
        if value(x).dtype != value(weight).dtype:
            return Miss(f"x is {value(x).dtype}, the weight unpacks to {value(weight).dtype}", node)
        if value(weight).dim() != 2:
            return Miss(f"the weight has {value(weight).dim()} dimensions", node)
        return UnpackedLinear(node, x, weight, order, bias)

    def rewrite(self, g: Rewriter, m: UnpackedLinear) -> None:
        data, scale, zero, spec = m.weight.args[:4]
        with g.before(m.linear):
            x = g.call(aten.index_select.default, m.x, value(m.x).dim() - 1, m.order) if m.order else m.x
            g.replace(m.linear, g.call(linear.overload, x, data, scale, zero, m.bias, spec, None))
