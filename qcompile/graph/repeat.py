"""The stretch of a graph that repeats, found on the graph alone: in a model, its layers.

    %a = …                                                                   before
    %b = linear(%a, w0);  %c = add(%a, %b)                                   ┐ one stretch,
    %d = linear(%c, w1);  %e = add(%c, %d)                                   ┘ twice
    return %e                                                                after

Nodes are compared by what they call, on which types, and by which nodes of their own stretch they read; what comes from
outside, a weight or the stretch before, may be another node each time, but not of another type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qcompile.graph.match import type_of, value

Stretch = tuple[Node, ...]

# What a stretch reads, call by call: a smaller one is part of a layer at most. (A layer may be one call of ours.) What
# repeats but once is compiled as quickly as it is found.
LEAST_OPERANDS = 20
LEAST_TIMES = 3


def find_repeat(graph: Graph) -> list[Stretch]:
    """Neighbouring stretches of calls that compute the same of other inputs; none if nothing worthwhile repeats.

    They are cut where the fewest values pass from one to the next.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    found = _period(_labels(nodes))
    if found is None:
        return []
    first, length, period = found
    if sum(len(node.all_input_nodes) for node in nodes[first : first + period]) < LEAST_OPERANDS:
        return []
    start = _best_cut(nodes, first, period)
    count = (first + length - start) // period
    stretches = [tuple(nodes[start + i * period : start + (i + 1) * period]) for i in range(count)]
    best, begin = range(0), 0
    for index in range(count):
        if index and not correspond(stretches[index - 1], stretches[index]):
            begin = index
        best = max(best, range(begin, index + 1), key=len)
    return [stretches[index] for index in best] if len(best) >= LEAST_TIMES else []


def externals(stretch: Sequence[Node]) -> list[Node]:
    """What a stretch reads from outside, in the order of first use."""
    inside = set(stretch)
    return list(dict.fromkeys(arg for node in stretch for arg in node.all_input_nodes if arg not in inside))


def correspond(one: Stretch, other: Stretch) -> bool:
    """Whether two stretches are one computation: `externals` of both are then in the same order, of the same types."""
    twin: dict[Node, Node] = {}
    for a, b in zip(one, other, strict=True):
        if a.target is not b.target or len(a.all_input_nodes) != len(b.all_input_nodes):
            return False
        for x, y in zip(a.all_input_nodes, b.all_input_nodes, strict=True):
            if twin.setdefault(x, y) is not y or type_of(value(x)) != type_of(value(y)):
                return False
        if _called(a, lambda node: twin[node]) != _called(b, lambda node: node):
            return False
        twin[a] = b
    inside = set(other)
    outside = [twin[node] for node in externals(one)]
    return len(set(outside)) == len(outside) and inside.isdisjoint(outside)


def _called(node: Node, change: Callable[[Node], Node]) -> str:
    """The arguments of a call as text, with the nodes that `change` makes of those in it."""
    return repr(map_arg((node.args, node.kwargs), lambda arg: f"%{change(arg).name}"))


def _labels(nodes: Sequence[Node]) -> Tensor:
    """A number for each node; equal ones may correspond."""
    numbers: dict[Any, int] = {}

    def number(thing: Any) -> int:
        return numbers.setdefault(thing, len(numbers))

    def label(node: Node) -> Any:
        args = repr(map_arg((node.args, node.kwargs), lambda arg: f"%{number(type_of(value(arg)))}"))
        return id(node.target), args, type_of(value(node))

    return torch.tensor([number(label(node)) for node in nodes], dtype=torch.int64)


def _period(labels: Tensor) -> tuple[int, int, int] | None:
    """(start, length, period) of the stretch of numbers whose repetitions save the most, or None."""
    best, saved = None, 0
    for period in range(1, len(labels) // LEAST_TIMES + 1):
        # Runs of equality lie between the places where a number differs from the one a period later.
        differs = torch.nonzero(labels[:-period] != labels[period:]).flatten()
        ends = torch.cat([torch.tensor([-1]), differs, torch.tensor([len(labels) - period])])
        runs = ends.diff() - 1
        longest = int(runs.argmax())
        run = int(runs[longest])
        if run // period * period > saved:
            best, saved = (int(ends[longest]) + 1, run + period, period), run // period * period
    return best


def _best_cut(nodes: Sequence[Node], start: int, period: int) -> int:
    """Where in the first period to begin, so that the fewest values are alive one period later."""
    place = {node: index for index, node in enumerate(nodes)}
    last = [max((place.get(user, len(nodes)) for user in node.users), default=-1) for node in nodes]

    def crossing(cut: int) -> float:
        alive = [value(nodes[index]) for index in range(start, cut) if last[index] >= cut]
        return len(alive) if all(isinstance(val, Tensor) for val in alive) else math.inf

    return min(range(start, start + period), key=lambda index: crossing(index + period))
