"""Attention spelled with matmul and softmax becomes torch's one node.

    w = softmax(q @ k.transpose(2, 3) * scale + mask, -1)
    y = w @ v                                     ->        y = scaled_dot_product_attention(q, k, v, mask, scale=scale)

    w = softmax(cap * tanh(q @ k.transpose(2, 3) * scale / cap) + mask, -1)
    y = w @ v                                     ->        y = qcompile.attention(q, k, v, mask, False, scale, cap)

and of a mask = where(seen, 0, lowest number) the keys that are not seen become -inf, but in rows that see nothing, as
left padding has: these stay the mean of all values. where(seen, 0, -inf) becomes `seen`. (A row that sees nothing is
then zeros, as of torch's attention, where softmax makes it NaN.)

Why: the logits never reach memory, and fuse_attention knows a single spelling of each; torch's attention caps nothing.
Keys at -inf need not be read, of a cache all that is not filled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    in_dtype,
    is_call,
    is_cast,
    is_tensor,
    only_reader,
    same_shape,
    skip_casts,
    value,
)
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention

_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Scores:
    """`product` is q @ k.transpose(2, 3), or q @ k where `k_is_turned`; factors of the three are in `scale`. Then came
    softcap * tanh(… / softcap), or not."""

    product: Node
    q: Node
    k: Node
    scale: float
    k_is_turned: bool
    softcap: float | None = None


@dataclass(frozen=True)
class Spelled:
    """The value of `root`: softmax(`scores`, of q and k, + mask) @ v, all in one dtype."""

    root: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scores: Scores


class RecognizeAttention:
    name = "recognize_attention"

    def match(self, node: Node) -> Spelled | Miss | None:
        if not is_call(node, aten.softmax.int, aten._softmax.default):
            return None
        readers = list(_readers(node))
        products = [user for user in readers if is_call(user, *_PRODUCTS) and skip_casts(user.args[0]) is node]
        if not products:
            return _interrupted(node, readers)
        if len(readers) > 1:
            return Miss("the attention weights are read elsewhere", node)
        if (rank := value(node).dim()) != 4:
            return Miss(f"attention in {rank} dimensions", node)
        if argument(node, 1, "dim") not in (3, -1):
            return Miss("the softmax is not over the last dimension", node)
        logits = skip_casts(node.args[0])
        scores, mask = _scores_and_mask(logits)
        if scores is None:
            return Miss("the logits are not q @ k.transpose(2, 3) * scale + mask", logits)
        if not same_shape(value(logits).shape, value(scores.product).shape):
            return Miss("the mask is larger than the logits", logits)
        for inner in (scores.product, logits):
            if only_reader(inner) is None:
                return Miss(f"{inner.name} has another user", inner)
        return _typed(products[0], scores, mask)

    def rewrite(self, g: Rewriter, m: Spelled) -> None:
        with g.before(m.root):
            mask = _choice(g, m.mask)
            k = g.call(aten.transpose.int, m.k, 2, 3) if m.scores.k_is_turned else m.k
            if m.scores.softcap is None:
                arguments = (m.q, k, m.v, mask, 0.0, False)
                y = g.call(aten.scaled_dot_product_attention.default, *arguments, scale=m.scores.scale)
            else:
                y = g.call(attention.overload, m.q, k, m.v, mask, False, m.scores.scale, m.scores.softcap)
            g.replace(m.root, y)


def _interrupted(softmax: Node, readers: list[Node]) -> Miss | None:
    between = readers[0] if len(readers) == 1 else None
    if between is None or not any(is_call(user, *_PRODUCTS) for user in _readers(between)):
        return None
    return Miss(f"{between.name} stands between softmax and product", softmax)


def _typed(product: Node, scores: Scores, mask: Node | None) -> Spelled | Miss:
    """The same in one dtype: that of q, before it was cast up for the product."""
    if (ends := cast_back(product, scores.q)) is None:
        return Miss(f"the result is {dtype_text(product)}, q is {dtype_text(scores.q)}", product)
    root, q = ends
    dtype = value(q).dtype
    given_v: Any = product.args[1]
    if scores.softcap is not None and value(scores.product).dtype != dtype:
        return Miss(f"soft-capped scores are {dtype_text(scores.product)}, q is {dtype_text(q)}", product)
    k: Any = in_dtype(scores.k, dtype)
    v: Any = in_dtype(given_v, dtype)
    for name, given, cast in (("k", scores.k, k), ("v", given_v, v)):
        if cast is None:
            return Miss(f"{name} is {dtype_text(given)}, q is {dtype_text(q)}", product)
        if not same_shape(value(cast).shape[:2], value(q).shape[:2]):
            return Miss(f"{name} has other heads than q", product)
    if mask is not None and value(mask).dtype not in (dtype, torch.float32):
        return Miss(f"the mask is {dtype_text(mask)}, q is {dtype_text(q)}", product)
    return Spelled(root, q, k, v, mask, scores)


def _choice(g: Rewriter, mask: Any) -> Any:
    """The mask to be added, as the choice of keys that it is made of where it is one, made once for all its readers."""
    where = skip_casts(mask)
    if not is_call(where, aten.where.ScalarOther):
        return mask
    seen, kept, hidden = where.args
    is_zero = is_call(kept, aten.zeros.default) or (is_call(kept, aten.full.default) and kept.args[1] == 0)
    if not is_zero or hidden > torch.finfo(value(mask).dtype).min:
        return mask
    if hidden == -math.inf:
        return seen
    for user in mask.users:
        if is_call(user, aten.where.ScalarSelf) and user.meta.get("origin") == g.origin:
            return user
    with g.after(mask):
        someone = g.call(aten.any.dim, seen, -1, True)
        skipped = g.call(aten.bitwise_and.Tensor, someone, g.call(aten.bitwise_not.default, seen))
        return g.call(aten.where.ScalarSelf, skipped, -math.inf, mask)


def _scores_and_mask(logits: Any) -> tuple[Scores | None, Node | None]:
    if (scores := _scores(logits)) is None and is_call(logits, aten.add.Tensor) and not logits.kwargs:
        for product, mask in (logits.args, logits.args[::-1]):
            if is_tensor(product) and is_tensor(mask) and (scores := _scores(product)) is not None:
                return scores, mask
    return scores, None


def _scores(node: Node) -> Scores | None:
    product, scale = _scaled(node)
    if is_call(capped := skip_casts(product), aten.tanh.default) and scale > 0:
        inner = _scores(capped.args[0])
        if inner is None or inner.softcap is not None:
            return None
        return replace(inner, scale=inner.scale * scale, softcap=scale)
    if not is_call(product := skip_casts(product), aten.matmul.default):
        return None
    (q, by_q), (k, by_k) = _scaled(product.args[0]), _scaled(product.args[1])
    turned = skip_casts(k)
    if is_call(turned, aten.transpose.int) and {dim % 4 for dim in turned.args[1:]} == {2, 3}:
        k, more = _scaled(turned.args[0])
        return Scores(product, q, k, scale * by_q * by_k * more, k_is_turned=False)
    # k.transpose(1, 2) turned once more is one permutation.
    if is_call(turned, aten.permute.default):
        return Scores(product, q, turned, scale * by_q * by_k, k_is_turned=True)
    return None


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
