"""Apply a pass to a graph: match, rewrite, count, clean up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_leaves

from qcompile import _torch
from qcompile.graph.match import Miss, module_path, same_shape, type_of, value

M = TypeVar("M")


class Rule(Protocol[M]):
    """A pass. `match` looks at one node and returns a match, a Miss with the reason, or None: not our business."""

    name: str

    def match(self, node: Node, /) -> M | Miss | None: ...

    def rewrite(self, g: Rewriter, match: M, /) -> None: ...


@dataclass(frozen=True)
class Site:
    """A place in the model, for reports: the node's name and the module it came from."""

    node: str
    module: str


@dataclass(frozen=True)
class PassResult:
    """What one pass did: where it rewrote, and where it looked and did not, with reasons."""

    name: str
    rewrites: tuple[Site, ...]
    misses: tuple[tuple[str, Site], ...]
    nodes_before: int
    nodes_after: int


class Unproven(Exception):
    """Two values ought to be of one shape, but their symbolic sizes are written differently."""


class Rewriter:
    """Builds new nodes next to old ones. Every node it makes has meta["val"], a module path and the pass's name."""

    def __init__(self, graph: Graph, origin: str):
        self.graph = graph
        self.origin = origin
        self._anchor: Node | None = None
        self._replaced: list[Node] = []
        self._made: list[Node] = []
        self._results: dict[Any, Any] = {}

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """New nodes go in front of `node` and inherit its module path."""
        previous, self._anchor = self._anchor, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._anchor = previous

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """New nodes go behind `node`, in order, and inherit its module path."""
        with self.before(node.next):
            self._anchor = node
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call node whose value is `target` run on the operands' fake values."""
        schema = getattr(target, "_schema", None)
        name = schema.name.rpartition("::")[2] if schema else None
        new = self.graph.create_node("call_function", target, args, kwargs, name=name)
        self._made.append(new)
        new.meta["val"] = self._result(target, map_arg((args, kwargs), value))
        self.stamp(new)
        return new

    def _result(self, target: Any, given: Any) -> Any:
        """Found once for all calls alike: the layers of a model repeat."""
        if not _decided_by_types(target):
            return _torch.call_on_fakes(target, *given[0], **given[1])
        leaves, structure = tree_flatten(given)
        key = (target, structure, *map(type_of, leaves))
        if key not in self._results:
            self._results[key] = _torch.call_on_fakes(target, *given[0], **given[1])
        return self._results[key]

    def stamp(self, new: Node) -> None:
        """Note where a node comes from."""
        assert self._anchor is not None
        new.meta["module_path"] = module_path(self._anchor)
        new.meta["origin"] = self.origin

    def replace(self, old: Node, new: Node) -> None:
        """All users of `old` read `new`. Raises RuntimeError if the two differ in shape, dtype or device, and Unproven
        if only symbolic sizes leave that open."""
        was, now = _leaves(value(old)), _leaves(value(new))
        if len(was) != len(now):
            raise RuntimeError(f"{self.origin}: {new.name} has {len(now)} values, {old.name} has {len(was)}")
        for a, b in zip(was, now):
            if not isinstance(a, torch.Tensor):
                continue
            if not _may_be_alike(a, b):
                raise RuntimeError(f"{self.origin}: {new.name} is {_type(b)}, {old.name} is {_type(a)}")
            if not same_shape(a.shape, b.shape):
                raise Unproven(f"{new.name} cannot be shown to have the shape of {old.name}")
        old.replace_all_uses_with(new)
        self._replaced.append(old)

    def erase(self, node: Node) -> None:
        """Remove a node without users, even one that writes to an operand."""
        self._replaced += node.all_input_nodes
        self.graph.erase_node(node)

    def undo(self) -> None:
        """Remove what was made since the last sweep and is not used. What was replaced by then is right as it is."""
        for node in reversed(self._made):
            if not node._erased and not node.users:
                self.graph.erase_node(node)
        self.sweep()

    def sweep(self) -> None:
        """Remove what was replaced and everything that only it used, so that counting users stays meaningful."""
        stack, self._replaced, self._made = self._replaced, [], []
        while stack:
            node = stack.pop()
            if not node._erased and not node.users and not _is_impure(node):
                stack += node.all_input_nodes
                self.graph.erase_node(node)


def apply(graph: Graph, rule: Rule[Any]) -> PassResult:
    """Run one pass over a graph, first node to last; dead code is removed and the graph checked afterwards.

    A module of the graph is left with its old code: to write that after every pass takes longer than most passes.
    """
    before = len(graph.nodes)
    rewriter, rewrites, misses = Rewriter(graph, rule.name), [], []
    for node in list(graph.nodes):
        if node._erased:
            continue
        found = rule.match(node)
        if found is None:
            continue
        if isinstance(found, Miss):
            misses.append((found.reason, Site(found.node.name, module_path(found.node))))
            continue
        site = Site(node.name, module_path(node))
        try:
            rule.rewrite(rewriter, found)
        except Unproven as unproven:
            rewriter.undo()
            misses.append((str(unproven), site))
            continue
        rewriter.sweep()
        rewrites.append(site)
    if rewrites:
        graph.eliminate_dead_code(is_impure_node=_is_impure)
        graph.lint()
    return PassResult(rule.name, tuple(rewrites), tuple(dict.fromkeys(misses)), before, len(graph.nodes))


def _is_impure(node: Node) -> bool:
    """Inputs and outputs stay, and calls that write to an argument; random calls without users may go."""
    if node.op in ("placeholder", "output"):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _may_be_alike(a: torch.Tensor, b: Any) -> bool:
    """Whether dtype, device and rank are equal, and no two numbers among the sizes differ."""
    if not isinstance(b, torch.Tensor) or (a.dtype, a.device, a.dim()) != (b.dtype, b.device, b.dim()):
        return False
    return all(x == y for x, y in zip(a.shape, b.shape) if isinstance(x, int) and isinstance(y, int))


def _type(tensor: Any) -> str:
    if not isinstance(tensor, torch.Tensor):
        return type(tensor).__name__
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _decided_by_types(target: Any) -> bool:
    """Whether the type of an op's result follows from those of its operands, as that of nonzero's does not."""
    tags = getattr(target, "tags", ())
    return torch.Tag.dynamic_output_shape not in tags and torch.Tag.data_dependent_output not in tags


def _leaves(values: Any) -> list[Any]:
    return tree_leaves(values)
