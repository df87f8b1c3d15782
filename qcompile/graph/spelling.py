"""Rewrites of one node into another way of writing the same value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.rewrite import Rewriter

Build = Callable[[Rewriter], Node]


@dataclass(frozen=True)
class Spelling:
    """`node` is worth the same as `instead`: a node, a node to be built in its place, or nothing."""

    node: Node
    instead: Node | Build | None

    def write(self, g: Rewriter) -> None:
        with g.before(self.node):
            if self.instead is not None:
                g.replace(self.node, self.instead if isinstance(self.instead, Node) else self.instead(g))
        # By hand, because an in-place op is never swept away.
        g.erase(self.node)


def spell(node: Node, target: Any, *args: Any) -> Build | None:
    """This call in place of `node`, or None if `node` is this call."""
    if node.target is target and node.args == args and not node.kwargs:
        return None
    return lambda g: g.call(target, *args)
