"""The gate before a linear of codes becomes part of it.

    x = qcompile.gated_act(gate, up, "silu")
    y = qcompile.linear_w8a8(x, W)                ->    y = qcompile.gated_linear_w8a8(gate, up, "silu", W)

Why: the product of gate and up, of the widest rows of a layer, is made in codes at once; its floats were written, and
read twice.

Where no kernel for this type of device has signed up, or the linear would not multiply codes, nothing is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from qcompile.graph.alias import is_written_between
from qcompile.graph.match import Miss, is_call, only_user, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.activation import gated_act
from qcompile.ops.gated_linear_w8a8 import gated_linear_w8a8
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import MEANING


@dataclass(frozen=True)
class GatedLinear:
    linear: Node
    gated: Node


class FuseGatedCodes:
    name = "fuse_gated_codes"

    def match(self, node: Node) -> GatedLinear | Miss | None:
        gated: Any = node.args[0] if is_call(node, linear_w8a8.overload) else None
        if not is_call(gated, gated_act.overload) or node.args[1] is not None:
            return None
        found = GatedLinear(node, gated)
        if not gated_linear_w8a8.serves(value(gated).device):
            return None
        if gated_linear_w8a8.choose(*map_arg(_arguments(found), value)).name == MEANING:
            return None
        if only_user(gated) is not node:
            return Miss("the gate's product has another user", gated)
        for factor in gated.args[:2]:
            if is_written_between(factor, node):
                return Miss(f"{factor.name} is written to before the linear", node)
        return found

    def rewrite(self, g: Rewriter, m: GatedLinear) -> None:
        with g.before(m.linear):
            g.replace(m.linear, g.call(gated_linear_w8a8.overload, *_arguments(m)))


def _arguments(m: GatedLinear) -> tuple[Any, ...]:
    return *m.gated.args, *m.linear.args[2:]
