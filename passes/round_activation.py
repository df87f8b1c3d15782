"""Inputs of quantized linears are rounded as the user asks for it, where their checkpoint does not ask for anything.

    y = qcompile.linear(x, …)          ->        y = qcompile.linear(round_activation(x, "i8/token/dynamic"), …)

Why: codes can be multiplied by codes then, see quantize_activation. Linears of one value share its rounding, so that
they are siblings still.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import writers
from qcompile.graph.match import is_call
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.activation_rounding import round_activation
from qcompile.ops.linear import linear


@dataclass(frozen=True)
class ExactLinear:
    linear: Node
    x: Node
    rounded: Node | None


class RoundActivation:
    name = "round_activation"

    def __init__(self, spec: str):
        self.spec = spec

    def match(self, node: Node) -> ExactLinear | None:
        if not is_call(node, linear.overload) or is_call(node.args[0], round_activation.overload):
            return None
        x: Any = node.args[0]
        for user in x.users:
            alike = is_call(user, round_activation.overload) and user.args == (x, None, None, self.spec)
            if alike and user < node and not any(user < writer < node for writer in writers(x)):
                return ExactLinear(node, x, user)
        return ExactLinear(node, x, None)

    def rewrite(self, g: Rewriter, m: ExactLinear) -> None:
        with g.before(m.linear):
            x = m.rounded or g.call(round_activation.overload, m.x, None, None, self.spec)
            g.replace(m.linear, g.call(linear.overload, x, *m.linear.args[1:]))
