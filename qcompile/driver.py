"""The text of the functions that call the regions of a graph.

    def run(a, w, …):                       def bind(a, w, …):
        v = torch.ops.aten.view.default(w, …    v = torch.ops.aten.view.default(w, [1])
        x, = region_0(a)                        bound_x, (x, ) = bind_region(region_0, a)
        y = torch.ops.….default([x, v], …)      bound_y = bind_call(torch.ops.….default, [x, v], …)
        z, = region_2(a, y)                     if bound_y is None: return None
        return (z,)                             def step():
                                                    bound_x()
                                                    y = bound_y()
                                                    z, = region_2(a, y)
                                                    return (z,)
                                                step.makers = [None]
                                                return step

`run` is the graph. `bind`, where there are calls that can be bound to their tensors, gives a function that is the graph
of the same inputs each time; or None where one of these calls is not bound. Regions of which nobody outside sees a
result are bound as well, if they read nothing that is made anew each time: then neither are their results. `makers` are
the bound calls that the results come from, where nothing compiled comes behind them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from qcompile import _torch
from qcompile.bound_region import bind_region
from qcompile.graph.alias import is_returned, shared_operand, storage, writers
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


def behind(first: Any, second: Any) -> Any:
    """The bound call `second`, which comes right behind `first` and has no result; nothing is left of it where the
    first one does it, too."""
    let_follow = getattr(first, "let_follow", None)
    return _nothing if let_follow is not None and let_follow(second) else second


def _nothing() -> None:
    pass


# What the functions read beside regions and constants.
SCOPE = {"torch": torch, "bind_call": bind_call, "bind_region": bind_region, "behind": behind}


def size_name(symbol: Any) -> str:
    return f"size_{symbol}"


def _steps(graph: Graph, regions: Sequence[Region], bound: Mapping[Node, str] | None = None) -> Iterator[str]:
    """Call the regions one by one, and let go of values that no later one reads. Those whose first node is `bound` are
    called so; what compiled ones among them make is there already, and stays."""
    bound = bound or {}
    last = {node: index for index, region in enumerate(regions) for node in region.inputs}
    (end,) = graph.find_nodes(op="output")
    last |= dict.fromkeys(end.all_input_nodes, len(regions))
    made = {
        node for region in regions if region.like == CALLED or region.nodes[0] not in bound for node in region.outputs
    }
    for index, region in enumerate(regions):
        results = "".join(f"{node.name}, " for node in region.outputs)
        if (call := bound.get(region.nodes[0])) is not None:
            yield f"    {call}"
        elif region.like == CALLED:
            yield f"    {region.nodes[0].name} = {_call(region.nodes[0])}"
        else:
            yield f"    {results and results + '= '}{_region_call(region)}"
        spent = [node.name for node in region.inputs if last[node] == index and node in made]
        spent += [node.name for node in region.outputs if node not in last and node in made]
        if spent:
            yield f"    del {', '.join(spent)}"
    yield f"    return {_written(end.args[0])}"


def _bound(graph: Graph, regions: Sequence[Region]) -> Iterator[str]:
    moving = {node for region in regions for node in region.outputs}
    bound: dict[Node, str] = {}
    before = None  # the bound call right before
    for region in regions:
        node = region.nodes[0]
        name = f"bound_{node.name}"
        if region.like == CALLED:
            given = [each for each in node.all_input_nodes if each in moving]
            bound[node] = f"{node.name} = {name}({_names(given)})"
            args = ", ".join(_written(arg, without=moving) for arg in node.args)
            yield f"    {name} = bind_call(torch.ops.{node.target}, {args})"
            yield f"    if {name} is None: return None"
            if before is not None and not given and not node.users:
                yield f"    {name} = behind({before}, {name})"
            before = name
            continue
        before = None
        if _may_stay(region, moving):
            moving.difference_update(region.outputs)
            bound[node] = f"{name}()"
            results = "".join(f"{node.name}, " for node in region.outputs)
            yield f"    {name}, ({results}) = bind_region({_region_call(region, called=False)})"
    yield "    def step():"
    yield from (f"    {line}" for line in _steps(graph, regions, bound))
    # Behind these nothing is compiled that could see what follows them.
    last = [region.nodes[0] for region in takewhile(lambda region: region.like == CALLED, reversed(regions))]
    (end,) = graph.find_nodes(op="output")
    makers = ", ".join(f"bound_{node.name}" if node in last else "None" for node in end.args[0])
    yield f"    step.makers = [{makers}]"
    yield "    return step"


def _may_stay(region: Region, moving: set[Node]) -> bool:
    """Whether this compiled region reads the same tensors each time, writes to none of them, and makes what nobody
    outside keeps."""
    inside = set(region.nodes)
    return (
        bool(region.outputs)
        and moving.isdisjoint(region.inputs)
        and not any(writer in inside for node in region.inputs for writer in writers(node))
        and not any(map(is_returned, region.outputs))
    )


def _region_call(region: Region, called: bool = True) -> str:
    given = [*map(size_name, region.symbols), *(node.name for node in region.inputs)]
    name = f"region_{region.like}"
    return f"{name}({', '.join(given)})" if called else ", ".join([name, *given])


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
