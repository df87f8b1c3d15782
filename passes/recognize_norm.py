"""A norm over the last dimension becomes one op, however it is spelled.

    s = rsqrt(mean(x², -1) + eps)
    y = x * s * (weight + 1)                 ->        y = qcompile.rms_norm(x, weight, eps, 1)

    c = x - mean(x, -1)
    s = rsqrt(mean(c², -1) + eps)
    y = c * s * weight + bias                ->        y = qcompile.layer_norm(x, weight, bias, eps)

Why: one kernel reads x once, and the passes after this one know a single spelling of each norm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
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
from qcompile.ops.norm import layer_norm, rms_norm


@dataclass(frozen=True)
class Norm:
    """The value of `root`: x, minus its mean if `centered`, over its root mean square, * (weight + offset) + bias."""

    root: Node
    x: Node
    eps: float
    centered: bool
    weight: Node | None = None
    offset: float = 0.0
    bias: Node | None = None


class RecognizeNorm:
    name = "recognize_norm"

    def match(self, node: Node) -> Norm | Miss | None:
        if is_call(node, aten.rms_norm.default, aten.layer_norm.default):
            return _torch_norm(node)
        if not is_call(node, aten.rsqrt.default, aten.sqrt.default) and not _is_power(node, -0.5):
            return None
        total = spread = skip_casts(node.args[0])
        eps = 0.0
        if is_call(total, aten.add.Tensor):
            spread, eps = (skip_casts(arg) for arg in total.args)
            if not is_call(spread, aten.mean.dim):
                spread, eps = eps, spread
        if not is_call(spread, aten.mean.dim) or (base := _squared(spread.args[0])) is None:
            return None
        if not isinstance(eps, (int, float)):
            return Miss("eps is not a constant", total)
        if not _is_over_last(spread):
            return Miss("the mean is not over the last dimension alone, and kept", spread)
        inverse = _reciprocal(node)
        for inner in (skip_casts(spread.args[0]), spread, total, node, inverse):
            if only_reader(inner) is None:
                return Miss(f"{inner.name} has another user", inner)
        product: Any = only_reader(inverse)
        x = _centered(base)
        other = _scaled(product, inverse)
        if other is None or _source(other) is not _source(base) or (_centered(other) is None) is not (x is None):
            return Miss("what is scaled is not what was squared", product)
        return _follow(Norm(product, base if x is None else x, float(eps), x is not None))

    def rewrite(self, g: Rewriter, m: Norm) -> None:
        with g.before(m.root):
            if m.centered:
                new = g.call(layer_norm.overload, m.x, m.weight, m.bias, m.eps)
            else:
                new = g.call(rms_norm.overload, m.x, m.weight, m.eps, m.offset)
            g.replace(m.root, new)


def _torch_norm(node: Node) -> Norm | Miss:
    args: Any = node.args
    x, over, centered = args[0], args[1], node.target is aten.layer_norm.default
    if len(over) != 1:
        return Miss(f"normalizes over the last {len(over)} dimensions", node)
    eps = argument(node, 4, "eps", 1e-5) if centered else argument(node, 3, "eps")
    if eps is None:
        eps = torch.finfo(torch.float64 if value(x).dtype == torch.float64 else torch.float32).eps
    bias = argument(node, 3, "bias") if centered else None
    return _follow(Norm(node, x, eps, centered, argument(node, 2, "weight"), 0.0, bias))


def _follow(norm: Norm) -> Norm | Miss:
    """Take in the weight, the bias and the casts behind a norm."""
    while (user := only_reader(norm.root)) is not None:
        if norm.weight is None and norm.bias is None and (weight := _vector(user, norm, aten.mul.Tensor)) is not None:
            norm = replace(norm, root=user, weight=weight)
            if not norm.centered and is_call(weight, aten.add.Tensor) and isinstance(weight.args[1], (int, float)):
                norm = replace(norm, weight=skip_casts(weight.args[0]), offset=float(weight.args[1]))
        elif norm.centered and norm.bias is None and (bias := _vector(user, norm, aten.add.Tensor)) is not None:
            norm = replace(norm, root=user, bias=bias)
        else:
            break
    if (ends := cast_back(norm.root, norm.x)) is None:
        return Miss(f"the result is {dtype_text(norm.root)}, x is {dtype_text(norm.x)}", norm.root)
    return replace(norm, root=ends[0], x=ends[1])


def _squared(node: Any) -> Any:
    """x of x², casts aside."""
    node = skip_casts(node)
    if is_call(node, aten.square.default) or _is_power(node, 2):
        return node.args[0]
    if is_call(node, aten.mul.Tensor) and skip_casts(node.args[0]) is skip_casts(node.args[1]):
        return node.args[0]
    return None


def _centered(node: Any) -> Any:
    """x of x - mean(x), over the last dimension."""
    node = skip_casts(node)
    if not is_call(node, aten.sub.Tensor) or "alpha" in node.kwargs:
        return None
    x, mean = node.args[0], skip_casts(node.args[1])
    is_own = is_call(mean, aten.mean.dim) and skip_casts(mean.args[0]) is skip_casts(x) and _is_over_last(mean)
    return x if is_own else None


def _source(node: Node) -> Node:
    """The x behind a node that is x or x - mean(x)."""
    return skip_casts(_centered(node) or node)


def _reciprocal(node: Any) -> Any:
    """1 / sqrt(v) where `node` is sqrt(v) and it is written so; else `node` itself, which is the factor or divisor."""
    reader: Any = only_reader(node)
    if node.target is not aten.sqrt.default or not is_call(reader, aten.reciprocal.default):
        return node
    after: Any = only_reader(reader)
    # `1 / x` is captured as reciprocal(x) * 1.
    return after if is_call(after, aten.mul.Tensor) and after.args[1] == 1 else reader


def _scaled(product: Node, inverse: Node) -> Any:
    """What is multiplied with 1 / sqrt(v), or divided by sqrt(v)."""
    if inverse.target is aten.sqrt.default:
        dividend, divisor = product.args if is_call(product, aten.div.Tensor) else (None, None)
        return dividend if skip_casts(divisor) is inverse and is_tensor(dividend) else None
    other = other_operand(product, inverse) if is_call(product, aten.mul.Tensor) else None
    return other if is_tensor(other) else None


def _vector(user: Node, norm: Norm, target: Any) -> Node | None:
    """The vector as long as the norm is wide that `user` multiplies with or adds, casts aside."""
    other = skip_casts(other_operand(user, norm.root)) if is_call(user, target) else None
    if not is_tensor(other) or value(other).dim() != 1 or user.kwargs:
        return None
    return other if same_shape(value(other).shape, value(norm.x).shape[-1:]) else None


def _is_power(node: Node, exponent: float) -> bool:
    return is_call(node, aten.pow.Tensor_Scalar) and bool(node.args[1] == exponent)


def _is_over_last(mean: Node) -> bool:
    dims, width = argument(mean, 1, "dim"), value(mean.args[0]).dim()
    return dims is not None and [dim % width for dim in dims] == [width - 1] and argument(mean, 2, "keepdim") is True
