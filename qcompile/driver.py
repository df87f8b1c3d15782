"""The text of the functions that call the regions of a graph.

    def run(a, w, …):                       def bind(a, w, …):
        v = torch.ops.aten.view.default(w, …    v = torch.ops.aten.view.default(w, [1])
        x, = region_0(a)                        bound_y = bind_call(torch.ops.….default, [None, v], …)
        y = torch.ops.….default([x, v], …)      if bound_y is None: return None
        region_2(a)                             def step():
        return (y,)                                 x, = region_0(a)
                                                    y = bound_y(x)
                                                    region_2(a)
                                                    return (y,)
                                                return step

`run` is the graph. `bind`, where there are calls that can be bound to their tensors, gives a function that is the graph
of the same inputs each time; or None where one of these calls is not bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qcompile import _torch
from qcompile.graph.alias import shared_operand, storage
from qcompile.graph.match import is_input, is_tensor, value
from qcompile.graph.repeat import Stretch
from qcompile.ops.registry import binder_of

# Each symbol among the inputs' sizes and strides: how to ask an input for it, and its number.
Symbols = dict[Any, tuple[str, torch.SymInt]]
# Instead of the index of code: a call that is not compiled.
CALLED = -1


@dataclass(frozen=True)
class Region:
    """A stretch of the graph with the nodes that it reads, those that others read of it, and the sizes it depends on.

    `like` is the index of the region whose code it shares, which may be its own, or CALLED.
    """

    nodes: Stretch
    inputs: list[Node]
    outputs: list[Node]
    symbols: list[Any]
    like: int


def input_views(calls: Sequence[Node]) -> list[Node]:
    """What these calls read that is a view of an input, and such views of which it is one; in the graph's order."""
    found: set[Node] = set()
    stack = [node for call in calls for node in call.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and _is_input_view(node):
            found.add(node)
            stack += node.all_input_nodes
    return sorted(found)


def _is_input_view(node: Node) -> bool:
    operand = shared_operand(node)
    if operand is None or node.all_input_nodes != [operand] or not is_input(storage(node)):
        return False
    made = _torch.call_on_fakes(cast(Any, node.target), *map_arg(node.args, value), **node.kwargs)
    return is_tensor(node) and _torch.in_one_memory(made, value(operand))  # a reshape may copy


def text(graph: Graph, regions: Sequence[Region], sizes: Symbols) -> str:
    """`run` and `bind` of a graph that is cut into these regions."""
    called = [region.nodes[0] for region in regions if region.like == CALLED]
    views = [f"    {node.name} = {_call(node)}" for node in input_views(called)]
    begin = [f"    {size_name(symbol)} = {asked}" for symbol, (asked, _) in sizes.items()] + views
    given = ", ".join(node.name for node in graph.find_nodes(op="placeholder"))
    lines = [f"def run({given}):", *begin, *_steps(graph, regions)]
    if called:
        lines += [f"def bind({given}):", *begin, *_bound(graph, regions)]
    return "\n".join(lines)


def bind_call(target: Any, *args: Any) -> Any:
    """The call of an op that is bound to its tensors, or None. See registry.binder."""
    binder = binder_of(target)
    return None if binder is None else binder.bind(*args)


# What the functions read beside regions and constants.
SCOPE = {"torch": torch, "bind_call": bind_call}


def size_name(symbol: Any) -> str:
    return f"size_{symbol}"


def _steps(graph: Graph, regions: Sequence[Region]) -> Iterator[str]:
    """Call the regions one by one, and let go of values that no later one reads."""
    last = {node: index for index, region in enumerate(regions) for node in region.inputs}
    (end,) = graph.find_nodes(op="output")
    last |= dict.fromkeys(end.all_input_nodes, len(regions))
    made = {node for region in regions for node in region.outputs}
    for index, region in enumerate(regions):
        results = "".join(f"{node.name}, " for node in region.outputs)
        if region.like == CALLED:
            yield f"    {region.nodes[0].name} = {_call(region.nodes[0])}"
        else:
            given = ", ".join([*map(size_name, region.symbols), *(node.name for node in region.inputs)])
            yield f"    {results and results + '= '}region_{region.like}({given})"
        spent = [node.name for node in region.inputs if last[node] == index and node in made]
        spent += [node.name for node in region.outputs if node not in last]
        if spent:
            yield f"    del {', '.join(spent)}"
    yield f"    return {_written(end.args[0])}"


def _bound(graph: Graph, regions: Sequence[Region]) -> Iterator[str]:
    made = {node for region in regions for node in region.outputs}
    calls = {}
    for region in regions:
        if region.like == CALLED:
            (node,) = region.nodes
            moving = [each for each in node.all_input_nodes if each in made]
            calls[f"    {node.name} = {_call(node)}"] = f"    {node.name} = bound_{node.name}({_names(moving)})"
            args = ", ".join(_written(arg, without=made) for arg in node.args)
            yield f"    bound_{node.name} = bind_call(torch.ops.{node.target}, {args})"
            yield f"    if bound_{node.name} is None: return None"
    yield "    def step():"
    yield from (f"    {calls.get(line, line)}" for line in _steps(graph, regions))
    yield "    return step"


def _call(node: Node) -> str:
    given = [*map(_written, node.args), *(f"{name}={_written(arg)}" for name, arg in node.kwargs.items())]
    return f"torch.ops.{node.target}({', '.join(given)})"


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(node.name for node in nodes)


def _written(arg: Any, without: set[Node] | None = None) -> str:
    return repr(map_arg(arg, lambda node: None if without and node in without else _Name(node.name)))


class _Name(str):
    """A word that is written without quotes."""

    __repr__ = str.__str__
