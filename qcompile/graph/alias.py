"""Which nodes share memory, and whether anything writes to it.

Captured graphs hold in-place ops (caches are written with `index_copy_`), so a rewrite that turns a copy into the
original, or reads a tensor at another place in the program, has to ask here first.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from qcompile import _torch
from qcompile.graph.match import aten, is_call, is_tensor, value

# Their schemas declare a new tensor; it is the old one where there is nothing to do.
_UNDECLARED = (
    aten.type_as.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten._unsafe_view.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_chunk.default,
    aten.unsafe_split_with_sizes.default,
    operator.getitem,
)


def _declared(node: Node) -> list[tuple[Any, Any]]:
    """(argument, alias info of the schema) for the arguments, and members of lists of them, that have such info."""
    schema = getattr(node.target, "_schema", None)
    given = [(arg, formal.alias_info) for arg, formal in zip(node.args, schema.arguments)] if schema else []
    each = [(one, info) for arg, info in given if info for one in (arg if isinstance(arg, (list, tuple)) else [arg])]
    return [(one, info) for one, info in each if isinstance(one, Node)]


def shared_operand(node: Node) -> Node | None:
    """The operand whose memory the result of `node` may share, or None: the result is new."""
    if is_call(node, *_UNDECLARED):
        return node.args[0]  # type: ignore[return-value]
    return next((arg for arg, _ in _declared(node)), None)


def storage(node: Node) -> Node:
    """The node that made the memory of `node`."""
    while (operand := shared_operand(node)) is not None:
        node = operand
    return node


def aliases(node: Node) -> Iterator[Node]:
    """Every node that may share memory with `node`, and itself."""
    stack = [storage(node)]
    while stack:
        yield (one := stack.pop())
        stack += [user for user in one.users if shared_operand(user) is one]


def writers(node: Node) -> Iterator[Node]:
    """Everything in the graph that writes to the memory of `node`."""
    for one in aliases(node):
        for user in one.users:
            if any(arg is one and info.is_write for arg, info in _declared(user)):
                yield user


def is_written(node: Node) -> bool:
    """Whether anything in the graph writes to the memory of `node`."""
    return any(True for _ in writers(node))


def shares_input(node: Any) -> bool:
    """Whether another input of the graph lies in the memory of this one, as a view of it that the caller made."""
    others = (other for other in node.graph.find_nodes(op="placeholder") if other is not node and is_tensor(other))
    return any(_torch.in_one_memory(value(other), value(node)) for other in others)


def is_written_between(node: Node, end: Node) -> bool:
    """Whether anything after `node` and before `end` writes to the memory of `node`."""
    return any(node < writer < end for writer in writers(node))


def is_returned(node: Node) -> bool:
    """Whether the caller gets to see the memory of `node`."""
    return any(user.op == "output" for one in aliases(node) for user in one.users)
