"""Activations that are rounded in one way for several readers are rounded once.

    q = linear(round_activation(x, "i8/token/dynamic"), …)          y = round_activation(x, "i8/token/dynamic")
    k = linear(round_activation(x, "i8/token/dynamic"), …)    ->    q, k = linear(y, …), linear(y, …)

Why: each module rounds what it reads; with one value between them, its readers are siblings again.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qcompile.graph.alias import writers
from qcompile.graph.match import is_call
from qcompile.graph.rewrite import Rewriter
from qcompile.graph.spelling import Spelling
from qcompile.ops.activation_rounding import round_activation


class ShareRounding:
    name = "share_rounding"

    def match(self, node: Node) -> Spelling | None:
        if not is_call(node, round_activation.overload):
            return None
        x: Any = node.args[0]
        alike = [user for user in x.users if user.target is node.target and user.args == node.args]
        first = min(alike)
        if first is node or any(first < writer < node for writer in writers(x)):
            return None
        return Spelling(node, first)

    def rewrite(self, g: Rewriter, m: Spelling) -> None:
        m.write(g)
