"""What changes nothing goes, and casts and squares are written one way.

    detach(x), dropout(x, p, False), x.to(x.dtype), x * 1, x + 0     ->    x
    x.to(device, dtype), type_as(x, y), _to_copy(x, dtype=d)         ->    to(x, d)
    x * x, square(x)                                                 ->    pow(x, 2)
    matmul(columns, rows), as the angles of rope                     ->    columns * rows
    _assert_tensor_metadata(x, …)                                    ->

Why: captured spellings change with each release of torch and transformers; later passes know one of each.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from qcompile.graph.alias import is_returned, is_written
from qcompile.graph.match import aten, is_call, is_tensor, named_argument, same_type, value
from qcompile.graph.rewrite import Rewriter
from qcompile.graph.spelling import Build, Spelling, spell
from qcompile.ops.registry import known


class Normalize:
    name = "normalize"

    def match(self, node: Node) -> Spelling | None:
        if is_call(node, aten._assert_tensor_metadata.default):
            return Spelling(node, None)
        if node.op != "call_function" or not node.args or not is_tensor(node):
            return None
        if is_call(node, operator.getitem) and is_call(node.args[0], aten.native_dropout.default):
            instead = _dropout(node)
        elif node.target in _SPELLINGS and is_tensor(node.args[0]):
            instead = _SPELLINGS[node.target](node)
        else:
            return None
        return None if instead is None else Spelling(node, instead)

    def rewrite(self, g: Rewriter, m: Spelling) -> None:
        m.write(g)


def _same(node: Node) -> Node | None:
    """Ops that give their operand, or a view of all of it."""
    x: Any = node.args[0]
    return x if same_type(node, x) else None


def _copy(node: Node, x: Any = None) -> Node | None:
    """A copy is its operand if nobody can tell: neither is written to, and the caller does not get the copy."""
    x = node.args[0] if x is None else x
    if same_type(node, x) and not (is_written(x) or is_written(node) or is_returned(node)):
        return x
    return None


def _multiply(node: Node) -> Node | Build | None:
    x, y = node.args
    if x is y:
        return spell(node, aten.pow.Tensor_Scalar, x, 2)
    return _copy(node) if _is_number(y, 1) else None


def _add(node: Node) -> Node | None:
    return _copy(node) if _is_number(node.args[1], 0) else None


def _divide(node: Node) -> Node | None:
    return _copy(node) if _is_number(node.args[1], 1) else None


def _is_number(x: Any, number: int) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x == number


def _square(node: Node) -> Build | None:
    return spell(node, aten.pow.Tensor_Scalar, node.args[0], 2)


def _outer(node: Node) -> Build | None:
    """Products with nothing to sum; of three dimensions, so that attention to a single key stays attention."""
    x, y = node.args
    if value(x).dim() != 3 or value(y).dim() != 3 or known(value(x).shape[-1]) != 1:
        return None
    return spell(node, aten.mul.Tensor, x, y)


def _dropout(node: Node) -> Node | None:
    """dropout, or the first result of native_dropout."""
    call, fresh = (node.args[0], True) if is_call(node, operator.getitem) else (node, False)
    if fresh and node.args[1] != 0:
        return None
    x, probability, training = call.args  # type: ignore[union-attr]
    if training and probability != 0:
        return None
    return _copy(node, x) if fresh or training else _same(node)


def _cast(node: Node) -> Node | Build | None:
    x = node.args[0]
    was, now = value(x), value(node)
    if was.device != now.device or was.layout != now.layout:
        return None
    if named_argument(node, "memory_format") not in (None, torch.preserve_format) and not _same_strides(was, now):
        return None
    if was.dtype != now.dtype:
        return spell(node, aten.to.dtype, x, now.dtype)
    copies = is_call(node, aten._to_copy.default) or named_argument(node, "copy")
    return _copy(node) if copies else _same(node)


def _contiguous(node: Node) -> Node | None:
    return _same(node) if _same_strides(value(node.args[0]), value(node)) else None


def _same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    # As expressions, see same_shape; the stride of a dimension of size 1 means nothing.
    strides = [[str(stride) for size, stride in zip(t.shape, t.stride()) if str(size) != "1"] for t in (a, b)]
    return strides[0] == strides[1]


_SPELLINGS: dict[Any, Any] = {
    target: function
    for function, targets in (
        (_same, (aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh.default)),
        (_same, (aten.expand.default, aten.expand_as.default, aten.positive.default)),
        (_copy, (aten.lift_fresh_copy.default,)),
        (_multiply, (aten.mul.Tensor,)),
        (_add, (aten.add.Tensor, aten.sub.Tensor)),
        (_divide, (aten.div.Tensor,)),
        (_square, (aten.square.default,)),
        (_outer, (aten.matmul.default, aten.bmm.default)),
        (_dropout, (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)),
        (_cast, (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.to.prim_Device)),
        (_cast, (aten._to_copy.default, aten.type_as.default)),
        (_contiguous, (aten.contiguous.default,)),
    )
    for target in targets
}
