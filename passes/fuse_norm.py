"""The residual sum before a norm becomes part of it.

    s = a + b                                          y, s = qcompile.add_rms_norm(a, b, weight, eps, offset)
    y = qcompile.rms_norm(s, weight, eps, offset)  ->
    …s is the residual stream…                         …s is the residual stream…

Why: a and b are read once, and the norm does not wait for the sum to come back from memory.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import is_written, is_written_between
from qcompile.graph.dump import type_text
from qcompile.graph.match import Miss, aten, is_call, is_tensor, module_path, same_type, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

_WITH_SUM: dict[Any, Any] = {rms_norm.overload: add_rms_norm.overload, layer_norm.overload: add_layer_norm.overload}


@dataclass(frozen=True)
class SummedNorm:
    """`norm` of `total` = a + b; `rest` are the norm's other arguments. All of it can be computed before `place`."""

    norm: Node
    total: Node
    a: Node
    b: Node
    rest: tuple[Any, ...]
    place: Node


class FuseNorm:
    name = "fuse_norm"

    def match(self, node: Node) -> SummedNorm | Miss | None:
        total: Any = node.args[0] if is_call(node, *_WITH_SUM) else None
        if not is_call(total, aten.add.Tensor):
            return None
        a, b = total.args
        if not is_tensor(b):
            return None
        if total.kwargs:
            return Miss("the sum is weighted", total)
        for term in (a, b):
            if not same_type(term, total):
                return Miss(f"{term.name} is {type_text(value(term))}, the sum is {type_text(value(total))}", total)
        # Other users of the sum may come before the norm, and the weight may be computed after the sum.
        place = min(total.users)
        for argument in node.args[1:]:
            if isinstance(argument, Node) and not argument < place:
                return Miss(f"{argument.name} is computed after the sum is read", node)
        if is_written(total) or any(is_written_between(term, place) for term in (a, b)):
            return Miss("the sum or a term of it is written to in place", total)
        return SummedNorm(node, total, a, b, node.args[1:], place)

    def rewrite(self, g: Rewriter, m: SummedNorm) -> None:
        with g.before(m.place):
            both = g.call(_WITH_SUM[m.norm.target], m.a, m.b, *m.rest)
            y, total = (g.call(operator.getitem, both, index) for index in (0, 1))
        for new in (both, y, total):
            new.meta["module_path"] = module_path(m.norm)
        g.replace(m.norm, y)
        g.replace(m.total, total)
