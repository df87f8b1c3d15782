"""Rows are flattened as late as possible, and mostly never.

    y = linear(reshape(x, [-1, k]), w)                        y = linear(x, w)
    z = relu(y)                                      ->       z = relu(y)
    reshape(z, [*x.shape[:-1], n])

Why: Conv1D, OPT and blocks with experts flatten batch and sequence, work on each row, and undo it. With the reshapes
out of the way, the residual stream is one shape, and sums, norms and linears stand next to one another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qcompile.graph.alias import is_written
from qcompile.graph.match import aten, is_call, is_tensor, named_argument, same_shape, value
from qcompile.graph.rewrite import Rewriter
from qcompile.graph.spelling import Build, Spelling, spell
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.registry import known


class NormalizeRows:
    name = "normalize_rows"

    def match(self, node: Node) -> Spelling | None:
        if node.op != "call_function" or not is_tensor(node):
            return None
        instead = _joined(node) if is_call(node, aten.reshape.default) else _sunk(node)
        return None if instead is None else Spelling(node, instead)

    def rewrite(self, g: Rewriter, m: Spelling) -> None:
        m.write(g)


def _joined(node: Node) -> Node | Build | None:
    """A reshape of a reshape."""
    flat: Any = node.args[0]
    if not is_call(flat, aten.reshape.default) or is_written(flat):
        return None
    x = flat.args[0]
    return x if same_shape(value(x).shape, value(node).shape) else spell(node, aten.reshape.default, x, node.args[1])


def _sunk(node: Node) -> Build | None:
    """An op on flattened rows as the op on rows, flattened."""
    operands = _row_operands(node)
    sources = [_unflattened(operand) for operand in operands]
    width = known(value(node).shape[-1]) if value(node).dim() == 2 else None
    if not sources or None in sources or width is None:
        return None
    if any(not same_shape(value(x).shape[:-1], value(sources[0]).shape[:-1]) for x in sources):
        return None
    rows = operands[0].args[1][0]

    def build(g: Rewriter) -> Node:
        swap: dict[Any, Any] = dict(zip(operands, sources))
        arguments = [swap.get(arg, arg) if isinstance(arg, Node) else arg for arg in node.args]
        y = g.call(node.target, *arguments, **node.kwargs)
        return g.call(aten.reshape.default, y, [rows, width])

    return build


def _row_operands(node: Node) -> list[Any]:
    """The operands that have rows, if the op makes each row of its result from the same row of each; else none."""
    first, *rest = node.args if node.args else (None,)
    if is_call(node, aten.linear.default, aten.to.dtype, round_activation.overload):
        return [first]
    if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
        return [first] if len(rest[0]) == 1 else []  # type: ignore[arg-type]
    if is_call(node, aten.mean.dim):
        return [first] if rest[0] == [-1] and named_argument(node, "keepdim") else []
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or node.target._schema.is_mutable:  # type: ignore[union-attr]
        return []
    return list(dict.fromkeys(arg for arg in node.args if is_tensor(arg) and value(arg).dim() > 1))


def _unflattened(flat: Any) -> Node | None:
    """x, if this is x with all dimensions but the last made into one."""
    if not is_call(flat, aten.reshape.default) or value(flat).dim() != 2 or is_written(flat):
        return None
    x = flat.args[0]
    same_width = same_shape(value(x).shape[-1:], value(flat).shape[-1:])
    return x if value(x).dim() > 2 and same_width else None
