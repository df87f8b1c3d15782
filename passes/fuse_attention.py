"""Attention becomes one op that reads each key/value head once for all the query heads that share it.

    k, v = each head of K, of V repeated n times
    y = scaled_dot_product_attention(q, k, v, mask)           ->        y = qcompile.attention(q, K, V, mask, …)

    w = softmax(q @ k.transpose(2, 3) * scale + mask, -1)
    y = w @ v                                                 ->        the same

Why: repeating writes and reads the whole cache n times over at every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from qcompile.graph.match import (
    Miss,
    argument,
    aten,
    dtype_text,
    in_dtype,
    is_call,
    is_tensor,
    only_reader,
    other_operand,
    same_shape,
    skip_casts,
    value,
)
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention


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
    product = only_reader(node)
    ...
