"""A product with a weight is a linear, however it was written.

    addmm(b, x, w), mm(x, w), matmul(x, w)                              ->    linear(x, transpose(w, 0, 1), b)
    mm(x, transpose(w, 0, 1))                                           ->    linear(x, w)

Why: one op to quantize and fuse. GPT-2's Conv1D keeps its weight transposed and calls addmm.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qcompile.graph.match import argument, aten, is_call, is_input, named_argument, same_shape, value
from qcompile.graph.rewrite import Rewriter
from qcompile.graph.spelling import Build, Spelling, spell
from qcompile.ops.linear import dequantize


class NormalizeLinear:
    name = "normalize_linear"

    def match(self, node: Node) -> Spelling | None:
        instead = None
        if is_call(node, aten.addmm.default):
            instead = _addmm(node)
        elif is_call(node, aten.mm.default, aten.matmul.default):
            instead = _linear(node, node.args[0], node.args[1], None)
        elif is_call(node, aten.linear.default) and argument(node, 2, "bias") is None:
            instead = spell(node, aten.linear.default, *node.args[:2])
        return None if instead is None else Spelling(node, instead)

    def rewrite(self, g: Rewriter, m: Spelling) -> None:
        m.write(g)


def _addmm(node: Node) -> Build | None:
    bias, x, weight = node.args
    if named_argument(node, "beta") != 1 or named_argument(node, "alpha") != 1:
        return None
    # Other biases broadcast over rows in ways that linear does not know.
    return _linear(node, x, weight, bias) if same_shape(value(bias).shape, value(node).shape[1:]) else None


def _linear(node: Node, x: Any, weight: Any, bias: Any) -> Build | None:
    if value(x).dim() < 2 or value(weight).dim() != 2 or not _is_weight(weight):
        return None
    tail = () if bias is None else (bias,)
    if is_call(weight, aten.transpose.int):
        return spell(node, aten.linear.default, x, weight.args[0], *tail)
    return lambda g: g.call(aten.linear.default, x, g.call(aten.transpose.int, weight, 0, 1), *tail)


_STEPS = (
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
    aten.narrow.default,
    aten.select.int,
    aten.squeeze.dim,
    aten.to.dtype,
)


def _is_weight(node: Any) -> bool:
    """Whether this is an input of the graph, unpacked codes, or a view of one of them."""
    while is_call(node, *_STEPS):
        node = node.args[0]
    return is_input(node) or node.op == "get_attr" or is_call(node, dequantize.overload)
