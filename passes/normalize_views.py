"""Views and cuts are each written one way.

    x.view(s), flatten(x), reshape(reshape(x, r), s)                    ->    reshape(x, s)
    t(x), x.mT, permute(x, [0, 2, 1]), swapaxes(x, 1, -1)               ->    transpose(x, 1, 2)
    x[:, 2:6], chunk(x, 3, 1)[1], narrow(narrow(x, 1, 0, 8), 1, 2, 4)   ->    narrow(x, 1, 2, 4)
    unbind(x, 1)[0]                                                     ->    select(x, 1, 0)
    x[:, :], x.view(x.shape), x.mT.mT                                   ->    x

Why: captured spellings change with each release of torch and transformers; later passes know one of each.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import is_written
from qcompile.graph.match import argument, aten, is_call, is_tensor, named_argument, same_shape, value
from qcompile.graph.rewrite import Rewriter
from qcompile.graph.spelling import Build, Spelling, spell
from qcompile.ops.registry import known


class NormalizeViews:
    name = "normalize_views"

    def match(self, node: Node) -> Spelling | None:
        function = _SPELLINGS.get(node.target)
        if node.op != "call_function" or function is None or not is_tensor(node):
            return None
        if function is not _part and not is_tensor(node.args[0]):
            return None
        instead = function(node)
        return None if instead is None else Spelling(node, instead)

    def rewrite(self, g: Rewriter, m: Spelling) -> None:
        m.write(g)


def _reshape(node: Node) -> Node | Build | None:
    x: Any = node.args[0]
    # A reshape that had to copy keeps what it saw, even if somebody writes to its operand later.
    while is_call(x, aten.reshape.default) and not is_written(x):
        x = x.args[0]
    if same_shape(value(x).shape, value(node).shape):
        return x
    if is_call(node, *_PLAIN_RESHAPES):
        return spell(node, aten.reshape.default, x, node.args[1])
    return lambda g: g.call(aten.reshape.default, x, _sizes(g, node))


def _sizes(g: Rewriter, node: Node) -> list[Any]:
    """The sizes that flatten, unflatten and reshape_as give."""
    x = node.args[0]
    rank = value(x).dim()
    if is_call(node, aten.view_as.default, aten.reshape_as.default):
        return [_size(g, node.args[1], dim) for dim in range(value(node).dim())]
    if is_call(node, aten.unflatten.int):
        first = last = node.args[1] % rank  # type: ignore[operator]
        sizes = list(node.args[2])  # type: ignore[arg-type]
    else:
        first, last = argument(node, 1, "start_dim", 0) % max(rank, 1), argument(node, 2, "end_dim", -1) % max(rank, 1)
        sizes = [-1]
    return [_size(g, x, d) for d in range(first)] + sizes + [_size(g, x, d) for d in range(last + 1, rank)]


def _size(g: Rewriter, x: Any, dim: int) -> Any:
    size = known(value(x).shape[dim])
    return g.call(aten.sym_size.int, x, dim) if size is None else size


def _permute(node: Node) -> Node | Build | None:
    x: Any = node.args[0]
    order = _order(node)
    while is_call(x, aten.transpose.int, aten.permute.default):
        inner = _order(x)
        x, order = x.args[0], [inner[dim] for dim in order]
    moved = [dim for dim, source in enumerate(order) if dim != source]
    if not moved:
        return x
    if len(moved) == 2:
        return spell(node, aten.transpose.int, x, *moved)
    return spell(node, aten.permute.default, x, order)


def _order(node: Any) -> list[int]:
    """Which dimension of the operand each dimension of the result is."""
    rank = value(node).dim()
    order = list(range(rank))
    if is_call(node, aten.permute.default):
        return [dim % rank for dim in node.args[1]]
    if is_call(node, aten.movedim.int):
        order.insert(node.args[2] % rank, order.pop(node.args[1] % rank))
    elif is_call(node, aten.numpy_T.default):
        order.reverse()
    elif rank > 1:
        a, b = (-2, -1) if is_call(node, aten.t.default, aten.mT.default) else node.args[1:3]
        order[a], order[b] = order[b], order[a]
    return order


def _slice(node: Node) -> Node | Build | None:
    if named_argument(node, "step") != 1:
        return None
    return _narrow(node, node.args[0], argument(node, 1, "dim", 0), argument(node, 2, "start") or 0)


def _cut(node: Node) -> Node | Build | None:
    return _narrow(node, node.args[0], node.args[1], node.args[2])


def _part(node: Node) -> Node | Build | None:
    """One result of chunk, split or unbind."""
    whole: Any
    index: Any
    whole, index = node.args
    if is_call(whole, aten.unbind.int):
        x, dim = whole.args[0], argument(whole, 1, "dim", 0)
        return spell(node, aten.select.int, x, dim % value(x).dim(), index)
    if not is_call(whole, *_SPLITS):
        return None
    x, dim = whole.args[0], argument(whole, 2, "dim", 0)
    before = [known(part.shape[dim]) for part in value(whole)[:index]]
    return None if None in before else _narrow(node, x, dim, sum(before))  # type: ignore[arg-type]


def _narrow(node: Node, x: Any, dim: Any, start: Any) -> Node | Build | None:
    """`node` as the part of `x` that begins at `start`, counted from the end if negative."""
    dim %= value(x).dim()
    size, length = known(value(x).shape[dim]), known(value(node).shape[dim])
    if same_shape(value(x).shape, value(node).shape):
        return x
    if length is None or not isinstance(start, int):
        return None
    if start < 0 or not length:
        # Only a known size says where that is, and whether an empty part begins inside.
        if size is None:
            return None
        start = min(max(start + size if start < 0 else start, 0), size)
    if is_call(x, aten.narrow.default) and x.args[1] == dim:
        x, start = x.args[0], start + x.args[2]
    return spell(node, aten.narrow.default, x, dim, start, length)


_PLAIN_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default)
_SPLITS = (
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
_SPELLINGS: dict[Any, Any] = {
    **dict.fromkeys(_PLAIN_RESHAPES, _reshape),
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.view_as.default: _reshape,
    aten.reshape_as.default: _reshape,
    aten.t.default: _permute,
    aten.numpy_T.default: _permute,
    aten.mT.default: _permute,
    aten.transpose.int: _permute,
    aten.swapaxes.default: _permute,
    aten.swapdims.default: _permute,
    aten.permute.default: _permute,
    aten.movedim.int: _permute,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _cut,
    operator.getitem: _part,
}
