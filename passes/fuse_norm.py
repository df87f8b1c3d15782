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

from qcompile.graph.alias import is_written
from qcompile.graph.match import Miss, aten, is_call, is_tensor, module_path, same_type
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

_WITH_SUM = {rms_norm.overload: add_rms_norm.overload, layer_norm.overload: add_layer_norm.overload}


@dataclass(frozen=True)
class SummedNorm:
    """`norm` of `total` = a + b; `rest` are the norm's other arguments."""

    norm: Node
    total: Node
    a: Node
    b: Node
    rest: tuple[Any, ...]


class FuseNorm:
    name = "fuse_norm"

    def match(self, node: Node) -> SummedNorm | Miss | None:
        if not is_call(node, *_WITH_SUM) or not is_call(total := node.args[0], aten.add.Tensor):
            return None
        a, b = total.args
        if not is_tensor(b):
            return None
        for term in (a, b):
            if not same_type(term, total):
                return Miss(f"{term.name} is not like the sum: broadcast, or of another dtype", total)
        if total.kwargs:
            return Miss("the sum is weighted", total)
        # The new node stands where the sum stood: users of the sum may come before the norm.
        late = [arg for arg in node.args[1:] if isinstance(arg, Node) and total < arg]
        if late:
            return Miss(f"{late[0].name} is computed after the sum", node)
        if is_written(total):
            return Miss("the sum is written to in place", total)
        return SummedNorm(node, total, a, b, node.args[1:])

    def rewrite(self, g: Rewriter, m: SummedNorm) -> None:
        with g.before(m.total):
            both = g.call(_WITH_SUM[m.norm.target], m.a, m.b, *m.rest)
            y, total = (g.call(operator.getitem, both, index) for index in (0, 1))
        for new in (both, y, total):
            new.meta["module_path"] = module_path(m.norm)
        g.replace(m.norm, y)
        g.replace(m.total, total)
