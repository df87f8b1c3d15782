"""Attention becomes one op that reads each key/value head once for all the query heads that share it.

    k, v = every head of K, of V, n times in a row
    y = scaled_dot_product_attention(q, k, v, mask)           ->        y = qcompile.attention(q, K, V, mask, …)

So does qcompile.attention(q, k, v, …), which recognize_attention makes of soft-capped scores.

Why: repeating writes and reads the whole cache n times over at every token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import is_written_between
from qcompile.graph.match import Miss, argument, aten, is_call, same_shape, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention
from qcompile.ops.registry import known


@dataclass(frozen=True)
class Heads:
    """The value of `root`: attention of q over k and v, each head of which serves as many of q as there are more, with
    the op's other arguments."""

    root: Node
    q: Node
    k: Node
    v: Node
    others: tuple[Any, ...]


class FuseAttention:
    name = "fuse_attention"

    def match(self, node: Node) -> Heads | Miss | None:
        if not is_call(node, aten.scaled_dot_product_attention.default, attention.overload):
            return None
        args: Any = node.args
        q, k, v = args[:3]
        if (rank := value(q).dim()) != 4:
            return Miss(f"attention in {rank} dimensions", node)
        is_ours = node.target is attention.overload
        others = args[3:] if is_ours else _others(node)
        if isinstance(others, Miss):
            return others
        (k, times), (v, times_v) = _unrepeated(k), _unrepeated(v)
        if is_ours and times == times_v == 1:
            return None
        if times != times_v:
            return Miss(f"k is repeated {times} times, v {times_v} times", node)
        heads, of_k, of_v = (known(value(x).shape[1]) for x in (q, k, v))
        if heads is None or of_k is None or of_v is None:
            return Miss("the number of heads is not a constant", node)
        if of_k != of_v or heads % of_k:
            return Miss(f"{heads} query heads over {of_k} key heads and {of_v} value heads", node)
        for x in (k, v):
            if is_written_between(x, node):
                return Miss(f"{x.name} is written to in between", node)
        return Heads(node, q, k, v, others)

    def rewrite(self, g: Rewriter, m: Heads) -> None:
        with g.before(m.root):
            g.replace(m.root, g.call(attention.overload, m.q, m.k, m.v, *m.others))


def _others(node: Node) -> tuple[Any, ...] | Miss:
    """Mask, is_causal and scale of torch's attention."""
    if argument(node, 4, "dropout_p", 0.0):
        return Miss("attention weights are dropped at random", node)
    scale: Any = node.kwargs.get("scale")
    if scale is None:
        if (width := known(value(node.args[0]).shape[-1])) is None:
            return Miss("the head dimension is not a constant", node)
        scale = 1 / math.sqrt(width)
    return argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False), float(scale)


def _unrepeated(node: Node) -> tuple[Any, Any]:
    """The (batch, heads, length, d) tensor behind one in which each head comes n times in a row, and n."""
    whole = _original(node)
    if is_call(whole, aten.repeat_interleave.self_int) and argument(whole, 2, "dim") in (1, -3):
        return whole.args[0], whole.args[1]
    if is_call(whole, aten.expand.default):
        x, (batch, heads, *rest) = whole.args[0], value(whole).shape
        if same_shape(value(x).shape, (batch, 1, *rest)) and known(heads):
            return x, known(heads)
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
    return (x, known(times)) if is_repeat and known(times) else (node, 1)


def _original(node: Any) -> Any:
    """Walk up over copies and slices that cut nothing off."""
    while is_call(node, aten.contiguous.default, aten.clone.default, aten.slice.Tensor):
        if not same_shape(value(node).shape, value(node.args[0]).shape):
            break
        node = node.args[0]
    return node
