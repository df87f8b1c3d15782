"""The vocabulary of a pass: what a node is, who uses it, and why something that looked right was left alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompile import _torch

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


def named_argument(node: Node, name: str) -> Any:
    """An argument of an op by its name in the schema; None if the op has none of this name."""
    schema = getattr(node.target, "_schema", None)
    for index, formal in enumerate(schema.arguments if schema else ()):
        if formal.name == name:
            return argument(node, index, name, formal.default_value)
    return None


def only_user(node: Node) -> Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def expressions(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes to compare: `==` on symbolic ones themselves would add guards."""
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are one expression."""
    return expressions(a) == expressions(b)


def type_of(val: Any) -> Any:
    """What the code for a value depends on: of a tensor dtype, device, sizes and strides; sizes may be symbols."""
    if isinstance(val, torch.Tensor):
        return val.dtype, val.device, expressions(val.shape), expressions(val.stride())
    if isinstance(val, (list, tuple)):
        return tuple(type_of(part) for part in val)
    if isinstance(val, (int, torch.SymInt)) and not isinstance(val, bool):
        return expressions([val])  # torch leaves numbers wrapped where a symbol was found to be one
    return type(val), str(val)


def same_type(a: Node, b: Node) -> bool:
    """Whether two nodes hold tensors of one shape, dtype and device."""
    x, y = value(a), value(b)
    return same_shape(x.shape, y.shape) and (x.dtype, x.device) == (y.dtype, y.device)


def module_path(node: Node) -> str:
    """Dotted path of the module that made the node, "" outside of any."""
    return node.meta.get("module_path", "")


CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.type_as.default, aten._to_copy.default)


def is_cast(node: Any) -> bool:
    """Whether `node` converts between floating dtypes, or not at all, on one device."""
    if not is_call(node, *CASTS):
        return False
    new, old = value(node), value(node.args[0])
    return new.is_floating_point() and old.is_floating_point() and new.device == old.device


def skip_casts(node: Any) -> Any:
    """Walk up over conversions between floating dtypes."""
    while is_cast(node):
        node = node.args[0]
    return node


def in_dtype(node: Any, dtype: torch.dtype) -> Node | None:
    """The first of `node` and of what it was cast from, step by step, that has this dtype."""
    while value(node).dtype != dtype and is_cast(node):
        node = node.args[0]
    return node if value(node).dtype == dtype else None


def only_reader(node: Node) -> Node | None:
    """The single user of a node that is not a cast, if nothing but casts lies between, else None."""
    user = only_user(node)
    while user is not None and is_cast(user):
        user = only_user(user)
    return user


def other_operand(user: Node, node: Node) -> Any:
    """What `user`, a call with two operands, reads beside `node`; None if it reads `node` twice. Casts aside."""
    others = [arg for arg in user.args if skip_casts(arg) is not skip_casts(node)]
    return others[0] if len(others) == 1 else None


def cast_back(root: Node, x: Node) -> tuple[Node, Node] | None:
    """Where a computation that starts at `x` and ends at `root` has one dtype at both ends.

    The ends are `root` or a cast behind it, the last one that will do, and `x` or what it was cast from.
    """
    found = None
    while True:
        if (source := in_dtype(x, value(root).dtype)) is not None:
            found = root, source
        user = only_user(root)
        if user is None or not is_cast(user):
            return found
        root = user


def dtype_text(node: Node) -> str:
    """A node's dtype without the `torch.`, for reasons and reports."""
    return str(value(node).dtype).removeprefix("torch.")


_COMMUTES = {aten.add.Tensor, aten.mul.Tensor, operator.add, operator.mul}


class Pattern:
    """A computation stated as a torch function, found in a graph whatever the order of sums and products.

        Pattern(lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w, "x w", eps=1e-5)

    Tensor parameters are named in one string; keyword parameters are scalars that bind to whatever number stands there.
    Conversions between floating dtypes are looked through on both sides: one pattern serves every dtype. The function
    is written as Normalize spells graphs: `x.pow(2)`, not `x * x`.
    """

    def __init__(self, function: Callable[..., Any], tensors: str, **scalars: float):
        names = tensors.split()
        # One tensor for each name: tracing tells them apart by identity.
        examples = [torch.ones(2, 8, dtype=torch.float64) for _ in names]
        # Scalars are traced as numbers that occur nowhere else and recognised by their value.
        marks = {name: 1e9 + 7 * index for index, name in enumerate(scalars, start=1)}
        traced = _torch.trace(lambda *xs: function(*xs, **marks), examples, pre_dispatch=True)
        inputs = traced.graph.find_nodes(op="placeholder")
        self._names = dict(zip(inputs, names, strict=True))
        self._marks = {mark: name for name, mark in marks.items()}
        (self._root,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes

    def match(self, node: Node) -> Match | None:
        """The values of all parameters if the value of `node` is this computation."""
        for bound in self._unify(self._root, node, {}):
            inner = {got for got in bound.values() if isinstance(got, Node)} | set(_casts(node))
            named = {name: bound[key] for key, name in self._names.items()}
            scalars = {key: number for key, number in bound.items() if isinstance(key, str)}
            return Match(node, {**named, **scalars}, frozenset(inner - set(named.values())))
        return None

    def _unify(self, want: Any, got: Any, bound: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        if not isinstance(want, Node):
            yield from self._unify_literal(want, got, bound)
        elif (want := skip_casts(want)) in bound:
            if bound[want] is skip_casts(got):
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
            name = self._marks[want]
            if isinstance(got, (int, float)) and bound.get(name, got) == got:
                yield {**bound, name: float(got)}
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


def _casts(node: Node) -> Iterator[Node]:
    """The conversions that `skip_casts` walks over, from `node` up."""
    while skip_casts(node) is not node:
        yield node
        node = node.args[0]  # type: ignore[assignment]


def _feeds_only(node: Node, inner: frozenset[Node]) -> bool:
    """Whether a cast between two inner nodes is itself inside."""
    return is_cast(node) and all(user in inner or _feeds_only(user, inner) for user in node.users)


def _trim(args: tuple[Any, ...], node: Node) -> tuple[Any, ...]:
    """Arguments with trailing defaults dropped, so that `mean(x, [-1], True)` compares equal however it was written."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return args
    full = list(args) + [node.kwargs.get(a.name, a.default_value) for a in schema.arguments[len(args) :]]
    while full and (full[-1] is None or full[-1] is False):
        full.pop()
    return tuple(full)
