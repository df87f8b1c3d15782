"""The vocabulary of a pass: what a node is, who uses it, and why something that looked right was left alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


@dataclass(frozen=True)
class Miss:
    """A site that a pass looked at and left, with the reason and the node at fault."""

    reason: str
    node: Node


def value(node: Any) -> Any:
    """What a node stands for: its fake tensor (or symbolic number), or the literal itself."""
    return node.meta.get("val") if isinstance(node, Node) else node


def is_call(node: Any, *targets: Callable[..., Any]) -> bool:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_tensor(node: Any) -> bool:
    return isinstance(value(node), torch.Tensor)


def is_input(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def same_type(a: Node, b: Node) -> bool:
    """Whether two nodes hold tensors of one shape, dtype and device."""
    x, y = value(a), value(b)
    return (tuple(x.shape), x.dtype, x.device) == (tuple(y.shape), y.dtype, y.device)


def module_path(node: Node) -> str:
    """Dotted path of the module that made the node, "" outside of any."""
    return node.meta.get("module_path", "")


CASTS = (aten.to.dtype, aten._to_copy.default)


def skip_casts(node: Any) -> Any:
    """Walk up over conversions between floating dtypes."""
    while is_call(node, *CASTS) and value(node).is_floating_point() and value(node.args[0]).is_floating_point():
        node = node.args[0]
    return node


_COMMUTES = {aten.add.Tensor, aten.mul.Tensor, operator.add, operator.mul}


class Pattern:
    """A computation stated as a torch function, found in a graph whatever the order of sums and products.

        Pattern(lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w, "x w", eps=1e-5)

    Tensor parameters are named in one string; keyword parameters are scalars that bind to whatever number stands there.
    Conversions between floating dtypes in the graph are looked through: one pattern serves every dtype.
    """

    def __init__(self, function: Callable[..., Any], tensors: str, **scalars: float):
        names = tensors.split()
        example = torch.randn(2, 8, dtype=torch.float64)
        # Scalars are traced as numbers that occur nowhere else and recognised by their value.
        marks = {name: 1e9 + 7 * index for index, name in enumerate(scalars, start=1)}
        traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *xs: function(*xs, **marks))(*[example] * len(names))
        inputs = traced.graph.find_nodes(op="placeholder")
        self._names = dict(zip(inputs, names, strict=True))
        self._marks = {mark: name for name, mark in marks.items()}
        (self._root,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes

    def match(self, node: Node) -> Match | None:
        """The values of all parameters if the value of `node` is this computation."""
        for bound in self._unify(self._root, node, {}):
            inner = frozenset(n for n in bound.values() if isinstance(n, Node))
            named = {name: bound[key] for key, name in self._names.items()}
            scalars = {key: number for key, number in bound.items() if isinstance(key, str)}
            inputs = set(named.values())
            return Match(node, {**named, **scalars}, frozenset(inner - inputs))
        return None

    def _unify(self, want: Any, got: Any, bound: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        if not isinstance(want, Node):
            yield from self._unify_literal(want, got, bound)
        elif want in bound:
            if bound[want] is got or skip_casts(bound[want]) is skip_casts(got):
                yield bound
        elif want in self._names:
            if isinstance(got, Node):
                yield {**bound, want: skip_casts(got)}
        elif is_call(got := skip_casts(got), want.target):
            orders = [(want.args, got.args)]
            if want.target in _COMMUTES and len(got.args) == 2:
                orders.append((want.args, got.args[::-1]))
            for wants, gots in orders:
                yield from self._unify_all(_trim(wants, want), _trim(gots, got), {**bound, want: got})

    def _unify_all(self, wants: tuple[Any, ...], gots: tuple[Any, ...], bound: dict[Any, Any]) -> Iterator[dict]:
        if len(wants) != len(gots):
            return
        if not wants:
            yield bound
            return
        for first in self._unify(wants[0], gots[0], bound):
            yield from self._unify_all(wants[1:], gots[1:], first)

    def _unify_literal(self, want: Any, got: Any, bound: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        if isinstance(want, float) and want in self._marks:
            if isinstance(got, (int, float)):
                yield {**bound, self._marks[want]: float(got)}
        elif isinstance(want, (list, tuple)) and isinstance(got, (list, tuple)):
            yield from self._unify_all(tuple(want), tuple(got), bound)
        elif isinstance(want, (int, float)) and isinstance(got, (int, float)):
            if float(want) == float(got):
                yield bound
        elif want == got:
            yield bound


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: its root, its parameters by name, and the nodes inside, root included."""

    root: Node
    bound: dict[str, Any]
    inner: frozenset[Node]

    def leak(self) -> Node | None:
        """An inner node that something outside the match reads, or None."""
        for node in sorted(self.inner - {self.root}):
            if any(user not in self.inner and not _feeds_only(user, self.inner) for user in node.users):
                return node
        return None


def _feeds_only(node: Node, inner: frozenset[Node]) -> bool:
    """Whether a cast between two inner nodes is itself inside."""
    return is_call(node, *CASTS) and all(user in inner or _feeds_only(user, inner) for user in node.users)


def _trim(args: tuple[Any, ...], node: Node) -> tuple[Any, ...]:
    """Arguments with trailing defaults dropped, so that `mean(x, [-1], True)` compares equal however it was written."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return args
    full = list(args) + [node.kwargs.get(a.name, a.default_value) for a in schema.arguments[len(args) :]]
    while full and full[-1] in (None, False):
        full.pop()
    return tuple(full)


def inputs_by_name(graph: Graph) -> dict[str, Node]:
    """Placeholders by name."""
    return {node.name: node for node in graph.find_nodes(op="placeholder")}
