"""A graph compiled in regions: the stretch that repeats once, what lies before and after it each as one.

A model of 32 layers is compiled as its embedding, one layer and its head, and a function that calls the layer 32 times,
each time with other weights. That saves most of the compiler's time; the calls cost a few microseconds each.

Where nothing repeats, what lies around a call that can be bound to its tensors (registry.binder) is compiled.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qcompile import _torch, driver
from qcompile.driver import CALLED, Region, Symbols, input_views, size_name
from qcompile.graph.alias import storage, writers
from qcompile.graph.match import is_input, is_tensor, value
from qcompile.graph.repeat import Stretch, externals, find_repeat
from qcompile.ops.registry import binder_of


@dataclass(frozen=True)
class Parts:
    """A graph cut into regions that are not compiled yet: each with the types of its inputs, by the name that functions
    in the text `driver` call it by (see driver.py); `constants` are what else these read."""

    graphs: dict[str, tuple[GraphModule, list[Any]]]
    driver: str
    constants: dict[str, Any]

    def compile(self, patches: dict[str, Any] | None = None) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """`run` and, if there is one, `bind` on compiled regions. `patches` are Inductor's options."""
        scope = driver.SCOPE | self.constants
        for name, (graph, types) in self.graphs.items():
            scope[name] = _torch.inductor(graph, types, patches)
        exec(self.driver, scope)
        return scope["run"], scope.get("bind")


def compile_graph(gm: GraphModule, fakes: Sequence[Any], patches: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile an inference graph whose placeholders are described by `fakes`; the result takes the same inputs.

    `patches` are Inductor's options. With CUDA graphs it stays whole: each region would be a graph of its own.
    """
    if (patches or {}).get("triton.cudagraphs"):
        return _torch.inductor(gm, fakes, patches)
    return cut(gm, fakes).compile(patches)[0]


def cut(gm: GraphModule, fakes: Sequence[Any]) -> Parts:
    """The regions of an inference graph whose placeholders are described by `fakes`; one if nothing repeats."""
    sizes = _symbols(gm.graph, fakes)
    regions = _regions(gm.graph, sizes) or _around_calls(gm.graph, sizes)
    if not regions or not all(_stands_alone(region, sizes) for region in regions):
        return Parts(
            {"region_0": (_bare(gm, gm.graph), list(fakes))}, "def run(*inputs):\n    return region_0(*inputs)", {}
        )
    mode = _torch.fake_mode_of(fakes)
    graphs = {
        f"region_{index}": _module(gm, region, sizes, mode)
        for index, region in enumerate(regions)
        if region.like == index
    }
    constants = {node.name: _constant(gm, node) for node in gm.graph.find_nodes(op="get_attr")}
    return Parts(graphs, driver.text(gm.graph, regions, sizes), constants)


def _regions(graph: Graph, sizes: Symbols) -> list[Region]:
    stretches = find_repeat(graph)
    if not stretches:
        return []
    calls = [node for node in graph.nodes if node.op == "call_function"]
    first, last = calls.index(stretches[0][0]), calls.index(stretches[-1][-1])
    parts = [tuple(calls[:first]), *stretches, tuple(calls[last + 1 :])]
    seen = [_seen_outside(part) for part in parts]
    # What anyone reads of one repetition, all of them return.
    shared = sorted(set().union(*seen[1:-1]))
    regions = []
    for index, part in enumerate(parts):
        if part:
            repeats = 0 < index < len(parts) - 1
            outputs = [part[i] for i in (shared if repeats else seen[index])]
            like = (1 if parts[0] else 0) if repeats else len(regions)
            regions.append(Region(part, externals(part), outputs, _free(part, sizes), like))
    return regions


def _around_calls(graph: Graph, sizes: Symbols) -> list[Region]:
    """The calls that can be bound to their tensors, and what lies before, between and behind them without the views of
    inputs that they read, which the driver makes."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    # What is bound is told its arguments by their places.
    bindable = [node for node in calls if not node.kwargs and all(map(is_tensor, node.all_input_nodes))]
    binders = {node: binder for node in bindable if (binder := binder_of(node.target)) is not None}
    if not any(binder.pays for binder in binders.values()):
        return []
    bindable = list(binders)
    apart = {*bindable, *input_views(bindable)}
    parts: list[Stretch] = []
    first = 0
    for node in bindable:
        parts += [tuple(calls[first : calls.index(node)]), (node,)]
        first = calls.index(node) + 1
    regions = []
    for part in (*parts, tuple(calls[first:])):
        called = part in [(node,) for node in bindable]
        if nodes := part if called else tuple(node for node in part if node not in apart):
            outputs = [nodes[i] for i in _seen_outside(nodes)]
            symbols = [] if called else _free(nodes, sizes)
            regions.append(Region(nodes, externals(nodes), outputs, symbols, CALLED if called else len(regions)))
    return regions


def _seen_outside(part: Stretch) -> list[int]:
    inside = set(part)
    return [i for i, node in enumerate(part) if any(user not in inside for user in node.users)]


def _stands_alone(region: Region, sizes: Symbols) -> bool:
    """Whether tensors and numbers pass in and out, of sizes that the inputs tell, and what it writes to is one whole
    input."""
    inside, passed = set(region.nodes), [value(node) for node in (*region.inputs, *region.outputs)]
    if any(isinstance(val, (list, tuple)) or val is None for val in passed):
        return False
    if any(symbol not in sizes for number in _sizes(region.nodes) for symbol in number.node.expr.free_symbols):
        return False
    owners = [storage(node) for node in region.inputs]
    return not any(
        any(writer in inside for writer in writers(node)) and (owner is not node or owners.count(owner) > 1)
        for node, owner in zip(region.inputs, owners, strict=True)
    )


def _symbols(graph: Graph, fakes: Sequence[Any]) -> Symbols:
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    given = [(name, fake) for name, fake in zip(names, fakes, strict=True) if isinstance(fake, Tensor)]
    asked = [(f"{name}.shape[{dim}]", size) for name, fake in given for dim, size in enumerate(fake.shape)]
    # Over a single element a stride may be anything.
    asked += [
        (f"{name}.stride({dim})", stride)
        for name, fake in given
        for dim, (stride, size) in enumerate(zip(fake.stride(), fake.shape, strict=True))
        if not (isinstance(size, int) and size == 1)
    ]
    found: Symbols = {}
    for text, number in asked:
        if isinstance(number, torch.SymInt) and number.node.expr.is_symbol:
            found.setdefault(number.node.expr, (text, number))
    return found


def _free(part: Stretch, sizes: Symbols) -> list[Any]:
    """The symbols among the sizes of all that a stretch reads and makes."""
    used = {symbol for number in _sizes(part) for symbol in number.node.expr.free_symbols}
    return [symbol for symbol in sizes if symbol in used]


def _sizes(part: Stretch) -> list[Any]:
    return [number for node in (*part, *externals(part)) for number in _numbers(value(node))]


def _numbers(val: Any) -> Iterator[Any]:
    if isinstance(val, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        yield val
    elif isinstance(val, Tensor):
        for number in (*val.shape, *val.stride(), val.storage_offset()):
            yield from _numbers(number)
    elif isinstance(val, (list, tuple)):
        for part in val:
            yield from _numbers(part)


def _module(gm: GraphModule, region: Region, sizes: Symbols, mode: Any) -> tuple[GraphModule, list[Any]]:
    """The region as a graph of its own, and the types of its inputs: sizes first."""
    graph, types = Graph(), []
    for symbol in region.symbols:
        types.append(sizes[symbol][1])
        graph.placeholder(size_name(symbol)).meta["val"] = types[-1]
    twin = {}
    for node in region.inputs:
        twin[node] = graph.placeholder(node.name)
        types.append(_fresh(value(node), mode))
        twin[node].meta["val"] = types[-1]
    for node in region.nodes:
        twin[node] = graph.node_copy(node, lambda arg: twin[arg])
    graph.output(tuple(twin[node] for node in region.outputs))
    return _bare(gm, graph), types


def _bare(gm: GraphModule, graph: Graph) -> GraphModule:
    """A copy of a graph over constants of `gm`, with no notes of tracing on its nodes but the types of inputs."""
    copy, twin = Graph(), {}
    for node in graph.nodes:
        twin[node] = copy.node_copy(node, lambda arg: twin[arg])
        twin[node].meta = {"val": value(node)} if is_input(node) else {}
    constants = {str(node.target): _constant(gm, node) for node in copy.find_nodes(op="get_attr")}
    return GraphModule(constants, copy)


def _constant(gm: GraphModule, node: Node) -> Any:
    return operator.attrgetter(str(node.target))(gm)


def _fresh(val: Any, mode: Any) -> Any:
    """A fake tensor of its own memory: in the graph two inputs may share some."""
    if not isinstance(val, Tensor) or mode is None:
        return val
    with mode:
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
