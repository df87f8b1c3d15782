"""Attention becomes one op that reads each key/value head once for all the query heads that share it.

    k, v = each head of K, of V repeated n times
    y = scaled_dot_product_attention(q, k, v, mask)           ->        y = qcompile.attention(q, K, V, mask, …)

    w = softmax(q @ k.transpose(2, 3) * scale + mask, -1)
    y = w @ v                                                 ->        the same

Why: repeating writes and reads the whole cache n times over at every token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from qcompile.graph.alias import is_written_between
from qcompile.graph.match import (
    Miss,
    argument,
    aten,
    cast_back,
    dtype_text,
    in_dtype,
    is_call,
    is_cast,
    only_reader,
    same_shape,
    skip_casts,
    value,
)
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention

_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Heads:
    """The value of `root`: attention of q over k and v, whose heads are repeated as often as q has more of them."""

    root: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    is_causal: bool
    scale: float


class FuseAttention:
    name = "fuse_attention"

    def match(self, node: Node) -> Heads | Miss | None:
        if is_call(node, aten.scaled_dot_product_attention.default):
            found = _from_one_node(node)
        elif is_call(node, aten.softmax.int, aten._softmax.default):
            found = _from_softmax(node)
        else:
            return None
        return _grouped(found) if isinstance(found, Heads) else found

    def rewrite(self, g: Rewriter, m: Heads) -> None:
        with g.before(m.root):
            g.replace(m.root, g.call(attention.overload, m.q, m.k, m.v, m.mask, m.is_causal, m.scale))


def _from_one_node(node: Node) -> Heads | Miss:
    q, k, v = node.args[:3]
    if argument(node, 4, "dropout_p", 0.0):
        return Miss("attention weights are dropped at random", node)
    scale = node.kwargs.get("scale")
    width = value(q).shape[-1]
    if scale is None and not isinstance(width, int):
        return Miss("the head dimension is not a constant", node)
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    return Heads(node, q, k, v, argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False), scale)


def _from_softmax(node: Node) -> Heads | Miss | None:
    """The spelling of transformers' eager_attention_forward."""
    readers = list(_readers(node))
    products = [user for user in readers if is_call(user, *_PRODUCTS) and skip_casts(user.args[0]) is node]
    if not products:
        between = readers[0] if len(readers) == 1 else None
        if between is not None and any(is_call(user, *_PRODUCTS) for user in _readers(between)):
            return Miss(f"{between.name} stands between softmax and product", node)
        return None
    if len(readers) > 1:
        return Miss("the attention weights are read elsewhere", node)
    root, v = products[0], products[0].args[1]
    if argument(node, 1, "dim") % value(node).dim() != value(node).dim() - 1:
        return Miss("the softmax is not over the last dimension", node)
    logits, mask = skip_casts(node.args[0]), None
    scores = _scores(logits)
    if scores is None and is_call(logits, aten.add.Tensor) and not logits.kwargs:
        terms = logits.args
        scores, mask = _scores(terms[0]), terms[1]
        if scores is None:
            scores, mask = _scores(terms[1]), terms[0]
    if scores is None:
        return Miss("the logits are not q @ k.transpose(2, 3) * scale + mask", logits)
    if isinstance(scores, Miss):
        return scores
    if not same_shape(value(logits).shape, value(scores.product).shape):
        return Miss("the mask is larger than the logits", logits)
    for inner in (scores.product, logits):
        if only_reader(inner) is None:
            return Miss(f"{inner.name} has another user", inner)
    if (ends := cast_back(root, scores.q)) is None:
        return Miss(f"the result is {dtype_text(root)}, q is {dtype_text(scores.q)}", root)
    dtype = value(ends[0]).dtype
    k, v = (in_dtype(x, dtype) or x for x in (scores.k, v))
    return Heads(ends[0], ends[1], k, v, mask, False, scores.scale)


@dataclass(frozen=True)
class Scores:
    """`product` is q @ k.transpose(2, 3), unscaled or with the scale in q or k."""

    product: Node
    q: Node
    k: Node
    scale: float


def _scores(node: Any) -> Scores | Miss | None:
    product, scale = _scaled(node)
    if is_call(product := skip_casts(product), aten.tanh.default):
        return Miss("logit soft-capping", product)
    if not is_call(product, aten.matmul.default):
        return None
    (q, by_q), (turned, by_turned) = _scaled(product.args[0]), _scaled(product.args[1])
    turned = skip_casts(turned)
    last = value(turned).dim() - 1
    if not is_call(turned, aten.transpose.int) or {dim % (last + 1) for dim in turned.args[1:]} != {last - 1, last}:
        return None
    k, by_k = _scaled(turned.args[0])
    return Scores(product, q, k, scale * by_q * by_turned * by_k)


def _scaled(node: Any) -> tuple[Any, float]:
    """x and c where `node` is x * c, or x / (1 / c), for a number c; casts of the product aside."""
    scale = 1.0
    while is_call(product := skip_casts(node), aten.mul.Tensor, aten.div.Tensor):
        x, factor = product.args
        if not isinstance(factor, (int, float)):
            break
        node, scale = x, scale / factor if product.target is aten.div.Tensor else scale * factor
    return node, scale


def _readers(node: Node) -> Iterator[Node]:
    """The users of a node, and instead of those that are casts their users."""
    for user in node.users:
        if is_cast(user):
            yield from _readers(user)
        else:
            yield user


def _grouped(m: Heads) -> Heads | Miss:
    """The same attention over heads that are not repeated."""
    for name, x in (("q", m.q), ("k", m.k), ("v", m.v)):
        if value(x).dim() != 4:
            return Miss(f"{name} has {value(x).dim()} dimensions", m.root)
        if value(x).dtype != value(m.q).dtype:
            return Miss(f"{name} is {dtype_text(x)}, q is {dtype_text(m.q)}", m.root)
    if m.mask is not None and value(m.mask).dtype not in (torch.bool, torch.float32, value(m.q).dtype):
        return Miss(f"the mask is {dtype_text(m.mask)}, q is {dtype_text(m.q)}", m.root)
    (k, times), (v, times_v) = _unrepeated(m.k), _unrepeated(m.v)
    if times != times_v:
        return Miss(f"k is repeated {times} times, v {times_v} times", m.root)
    heads = [value(x).shape[1] for x in (m.q, k, v)]
    if not all(isinstance(n, int) for n in heads) or heads[1] != heads[2] or heads[0] % heads[1]:
        return Miss("{} query heads over {} key and {} value heads".format(*heads), m.root)
    for x in (k, v):
        if is_written_between(x, m.root):
            return Miss(f"{x.name} is written to in between", m.root)
    return replace(m, k=k, v=v)


def _unrepeated(node: Node) -> tuple[Node, int]:
    """The (batch, heads, length, d) tensor behind one in which each head comes n times in a row, and n."""
    whole = _original(node)
    if is_call(whole, aten.repeat_interleave.self_int) and argument(whole, 2, "dim") in (1, -3):
        return whole.args[0], whole.args[1]
    if is_call(whole, aten.expand.default):
        x, (batch, heads, *rest) = whole.args[0], value(whole).shape
        if same_shape(value(x).shape, (batch, 1, *rest)):
            return x, heads
    if not is_call(whole, aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node, 1
    wide = _original(whole.args[0])
    if not is_call(wide, aten.expand.default, aten.repeat.default) or value(wide).dim() != 5:
        return node, 1
    if not is_call(one := _original(wide.args[0]), aten.unsqueeze.default, aten.reshape.default, aten.view.default):
        return node, 1
    x, (batch, heads, times, *rest) = one.args[0], value(wide).shape
    is_repeat = (
        same_shape(value(x).shape, (batch, heads, *rest))
        and same_shape(value(one).shape, (batch, heads, 1, *rest))
        and same_shape(value(whole).shape, (batch, heads * times, *rest))
    )
    return (x, times) if is_repeat else (node, 1)


def _original(node: Node) -> Node:
    """Walk up over copies and slices that cut nothing off."""
    while is_call(node, aten.contiguous.default, aten.clone.default, aten.slice.Tensor):
        if not same_shape(value(node).shape, value(node.args[0]).shape):
            break
        node = node.args[0]
    return node
