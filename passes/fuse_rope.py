"""Rotary position embedding, spelled with rotate_half, becomes one op.

    r = cat([-x[..., n/2:], x[..., :n/2]], -1)
    y = x * cos + r * sin                            ->        y = qcompile.rope(x, cos, sin)

Why: one pass over x instead of five, and one node for a kernel that goes on to write a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.match import (
    Miss,
    argument,
    aten,
    cast_back,
    dtype_text,
    is_call,
    is_tensor,
    only_reader,
    other_operand,
    same_shape,
    skip_casts,
    value,
)
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.registry import known
from qcompile.ops.rope import rope


@dataclass(frozen=True)
class Rotation:
    """`root` is x, its halves turned against each other by the angles behind cos and sin."""

    root: Node
    x: Node
    cos: Node
    sin: Node


@dataclass(frozen=True)
class Columns:
    """`length` columns of `base`, the first one `start`, the next one `step` further."""

    base: Node
    start: int
    length: int
    step: int = 1


class FuseRope:
    name = "fuse_rope"

    def match(self, node: Node) -> Rotation | Miss | None:
        joined: Any = node.args[0] if is_call(node, aten.cat.default, aten.stack.default) else ()
        if len(joined) != 2:
            return None
        parts = [skip_casts(part) for part in joined]
        if is_call(parts[0], aten.sub.Tensor) and is_call(parts[1], aten.add.Tensor):
            return _half_by_half(node, parts)
        turned = [is_call(part, aten.neg.default) for part in parts]
        if turned not in ([True, False], [False, True]):
            return None
        high, low = (_columns(part.args[0] if negated else part) for part, negated in zip(parts, turned))
        if high is None or low is None or high.base is not low.base:
            return None
        if high.step == low.step == 2:
            return Miss("interleaved rotary layout", node)
        if high.step != 1 or low.step != 1 or high.start != low.start + low.length:
            return None
        if node.target is not aten.cat.default or argument(node, 1, "dim", 0) not in (-1, value(node).dim() - 1):
            return None
        if turned[1]:
            return Miss("turns the other way: (x2, -x1)", node)
        if high.length != low.length:
            return Miss(f"the halves are {low.length} and {high.length} wide", node)
        return _rotation(node, Columns(low.base, low.start, 2 * low.length))

    def rewrite(self, g: Rewriter, m: Rotation) -> None:
        with g.before(m.root):
            g.replace(m.root, g.call(rope.overload, m.x, m.cos, m.sin))


def _half_by_half(node: Node, parts: list[Node]) -> Miss | None:
    """cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin])"""
    products = [skip_casts(arg) for part in parts for arg in part.args]
    if not all(is_call(product, aten.mul.Tensor) for product in products):
        return None
    pieces = [{_columns(arg) for arg in product.args} for product in products]
    shared = [a & b for a, b in ((pieces[0], pieces[3]), (pieces[1], pieces[2]))]
    if not all(shared):
        return None
    return Miss("the halves are turned one by one", node)


def _rotation(turned: Node, whole: Columns) -> Rotation | Miss:
    """From rotate_half(x) down to the sum, and up from there to x and cos."""
    by_sin: Any = only_reader(turned)
    if by_sin is None:
        return Miss("rotate_half has another user", turned)
    total: Any = only_reader(by_sin)
    if not is_call(by_sin, aten.mul.Tensor) or not is_call(total, aten.add.Tensor) or total.kwargs:
        return Miss("rotate_half is not in a sum x * cos + rotate_half(x) * sin", turned)
    sin, by_cos = other_operand(by_sin, turned), skip_casts(other_operand(total, by_sin))
    sides: Any = by_cos.args if is_call(by_cos, aten.mul.Tensor) else ()
    xs = [arg for arg in sides if _columns(arg) == whole]
    if len(xs) != 1:
        return Miss("what is multiplied with cos is not what was rotated", total)
    if only_reader(by_cos) is not total:
        return Miss(f"{by_cos.name} has another user", by_cos)
    cos = sides[1] if sides[0] is xs[0] else sides[0]
    if not same_shape(value(total).shape, value(xs[0]).shape):
        return Miss("cos and sin do not broadcast to x", total)
    if (ends := cast_back(total, xs[0])) is None:
        return Miss(f"the result is {dtype_text(total)}, x is {dtype_text(xs[0])}", total)
    return Rotation(*ends, cos, sin)


def _columns(node: Any) -> Columns | None:
    """Which columns of which tensor `node` is, casts aside; None where a size is symbolic."""
    node = skip_casts(node)
    if not is_tensor(node) or not value(node).dim() or (width := known(value(node).shape[-1])) is None:
        return None
    if is_call(node, aten.narrow.default) and _is_last(node, node.args[1]):
        source, start, step = node.args[0], node.args[2], 1
    elif is_call(node, aten.slice.Tensor) and _is_last(node, argument(node, 1, "dim", 0)):
        source, start, step = node.args[0], argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    else:
        return Columns(node, 0, width)
    outer = _columns(source)
    if outer is None or not isinstance(start, int) or start < 0:
        return None
    return Columns(outer.base, outer.start + outer.step * start, width, outer.step * step)


def _is_last(node: Node, dim: int) -> bool:
    return dim % value(node).dim() == value(node).dim() - 1
