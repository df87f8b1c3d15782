"""Quantized linears that read one value, and whose weights lie side by side, become one wider linear.

    q = qcompile.linear(x, rows 0…64 of W)                  y = qcompile.linear(x, W)
    k = qcompile.linear(x, rows 64…96 of W)       ->        q, k, v = columns 0…64, 64…96 and 96…128 of y
    v = qcompile.linear(x, rows 96…128 of W)

Why: x is read once and one kernel is launched; the fewer the rows of x, the more a launch counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import is_written
from qcompile.graph.match import Miss, aten, is_call, is_input, module_path, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.linear import linear
from qcompile.ops.registry import known
from qcompile.quant.spec import QSpec


@dataclass(frozen=True)
class Rows:
    """Rows start … start + count of `base`."""

    base: Node
    start: int
    count: int

    @staticmethod
    def of(node: Any) -> Rows:
        if is_call(node, aten.narrow.default) and node.args[1] == 0:
            base, _, start, count = node.args
            return Rows(base, start, count)
        return Rows(node, 0, value(node).shape[0])

    @staticmethod
    def union(nodes: Sequence[Any]) -> Rows | None:
        """What `nodes` are together: neighbouring rows, in this order, or one node for all; else None."""
        parts = [Rows.of(node) for node in nodes]
        if len(set(nodes)) == 1:
            return parts[0]
        if any(a.base is not b.base or a.start + a.count != b.start for a, b in pairwise(parts)):
            return None
        return Rows(parts[0].base, parts[0].start, sum(part.count for part in parts))

    def build(self, g: Rewriter) -> Node:
        whole = self.start == 0 and self.count == value(self.base).shape[0]
        return self.base if whole else g.call(aten.narrow.default, self.base, 0, self.start, self.count)


@dataclass(frozen=True)
class Siblings:
    """Linears in the order of their rows, and what they read together. Several biases are joined in the graph."""

    linears: tuple[Node, ...]
    first: Node
    data: Rows
    scale: Rows
    zero: Rows | None
    biases: tuple[Rows, ...]


class FuseSiblings:
    name = "fuse_siblings"

    def match(self, node: Node) -> Siblings | Miss | None:
        if is_call(node, aten.linear.default):
            return _dense(node)
        if not is_call(node, linear.overload):
            return None
        groups: dict[Node, list[Node]] = {}
        for sibling in _readers(node.args[0], linear.overload):
            groups.setdefault(Rows.of(sibling.args[1]).base, []).append(sibling)
        mine = groups.get(Rows.of(node.args[1]).base, [])
        if len(mine) > 1:
            return _side_by_side(mine) if node is mine[0] else None
        alone = [group[0] for group in groups.values() if len(group) == 1]
        # Once for all that read x, by the last one: those before it may just have become one.
        if len(groups) > 1 and node is alone[-1]:
            return Miss(_why_apart([sibling for group in groups.values() for sibling in group]), node)
        return None

    def rewrite(self, g: Rewriter, m: Siblings) -> None:
        with g.before(m.first):
            biases = [bias.build(g) for bias in m.biases]
            bias = g.call(aten.cat.default, biases) if len(biases) > 1 else biases[0] if biases else None
            weight = m.data.build(g), m.scale.build(g), m.zero and m.zero.build(g)
            y = g.call(linear.overload, m.first.args[0], *weight, bias, m.first.args[5], None)
            start = 0
            for old in m.linears:
                width = value(old).shape[-1]
                part = g.call(aten.narrow.default, y, value(y).dim() - 1, start, width)
                part.meta["module_path"] = module_path(old)
                g.replace(old, part)
                start += width


def _readers(x: Any, target: Any) -> list[Node]:
    """Calls of `target` on `x`, in the order of the graph."""
    return sorted(user for user in x.users if is_call(user, target) and user.args[0] is x and user.users)


def _dense(node: Node) -> Miss | None:
    readers = [user for user in _readers(node.args[0], aten.linear.default) if is_input(user.args[1])]
    weights: list[Any] = [user.args[1] for user in readers]
    if len(set(weights)) < 2 or node is not readers[0]:
        return None
    return Miss("the weights are dense and not stored side by side", node)


def _why_apart(linears: Sequence[Node]) -> str:
    specs = dict.fromkeys(str(sibling.args[5]) for sibling in linears)
    return f"siblings are {' and '.join(specs)}" if len(specs) > 1 else "siblings are not stored side by side"


def _side_by_side(linears: list[Node]) -> Siblings | Miss:
    first: Any = linears[0]
    if any(sibling.args[6] is not None for sibling in linears):
        return Miss("a sibling has an activation", first)
    if is_written(first.args[0]):
        return Miss("the siblings read a tensor that is written in place", first)
    linears = sorted(linears, key=lambda sibling: Rows.of(sibling.args[1]).start)
    rows = [Rows.of(sibling.args[1]) for sibling in linears]
    if any(a.start + a.count > b.start for a, b in pairwise(rows)):
        return Miss("two siblings share a weight", first)
    data, scale = (Rows.union([sibling.args[i] for sibling in linears]) for i in (1, 2))
    if data is None or len({str(sibling.args[5]) for sibling in linears}) > 1:
        return Miss(_why_apart(linears), first)
    symmetric = first.args[3] is None
    zero = None if symmetric else Rows.union([sibling.args[3] for sibling in linears])
    columns = value(first.args[0]).shape[-1]
    shared = QSpec.parse(first.args[5]).scale_shape(data.count, known(columns) or columns)[0]
    if scale is None or scale.count != shared or not (symmetric or (zero and zero.count == shared)):
        return Miss("siblings have scales of their own", first)
    biases = _biases([sibling.args[4] for sibling in linears])
    if biases is None:
        return Miss("a sibling has a bias and another has none", first)
    if any(first < part.base for part in (data, scale, zero, *biases) if part):
        return Miss("a weight or bias is computed behind the first sibling", first)
    return Siblings(tuple(linears), first, data, scale, zero, biases)


def _biases(nodes: list[Any]) -> tuple[Rows, ...] | None:
    if all(node is None for node in nodes):
        return ()
    if any(node is None for node in nodes):
        return None
    together = Rows.union(nodes) if len(set(nodes)) > 1 else None
    return (together,) if together else tuple(Rows.of(node) for node in nodes)
