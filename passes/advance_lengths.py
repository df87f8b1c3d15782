"""The lengths of all layers' caches grow at the end of a call, by one launch.

    at = add(arange(1), length)                            at = reshape(length, [1])
    add_(length, 1)                        ->              …
    … at every layer                                       _foreach_add_([length, …], 1)

Why: each layer of a static cache counts for itself, in a launch of its own between its projections and attention, which
waits for the one before it to end and which attention waits for. A length that stays what it is until the end is itself
the position of one new token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompile.graph.alias import aliases, is_returned, is_written, shares_input, writers
from qcompile.graph.match import aten, is_call, is_input, value
from qcompile.graph.rewrite import Rewriter


@dataclass(frozen=True)
class Advances:
    """`root` is the first of `writes`, each of which adds the same number to a length of its own."""

    root: Node
    writes: tuple[Node, ...]


class AdvanceLengths:
    name = "advance_lengths"

    def match(self, node: Node) -> Advances | None:
        if not _advances(node):
            return None
        writes = [other for other in node.graph.nodes if _advances(other) and other.args[1] == node.args[1]]
        return Advances(node, tuple(writes)) if writes[0] is node and len(writes) > 1 else None

    def rewrite(self, g: Rewriter, m: Advances) -> None:
        lengths: list[Any] = [write.args[0] for write in m.writes]
        count = m.root.args[1]
        for write in m.writes:
            g.erase(write)
        for length in lengths:
            for position in [user for user in length.users if _is_position(user, length)]:
                with g.before(position):
                    g.replace(position, g.call(aten.reshape.default, length, [1]))
        with g.before(next(iter(m.root.graph.find_nodes(op="output")))):
            g.call(aten._foreach_add_.Scalar, lengths, count)


def _advances(node: Node) -> bool:
    """Whether it adds a number to an input of one element that nothing reads afterwards."""
    if not is_call(node, aten.add_.Tensor) or node.users or node.kwargs:
        return False
    length: Any
    length, count = node.args
    if not is_input(length) or not isinstance(value(count), (int, torch.SymInt)):
        return False
    if value(length).dim() or is_returned(length):
        return False
    readers = [user for one in aliases(length) for user in one.users]
    if list(writers(length)) != [node] or not all(reader <= node for reader in readers):
        return False
    return not shares_input(length)


def _is_position(node: Node, length: Any) -> bool:
    """Whether it is arange(1) + length, and stays what it is."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or is_returned(node) or is_written(node):
        return False
    operands: Any = node.args
    if not any(is_call(arg, aten.arange.default) and arg.args[0] == 1 for arg in operands):
        return False
    at, start = value(node), value(length)
    return (at.dtype, at.device) == (start.dtype, start.device)
