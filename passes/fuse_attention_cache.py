"""For one new token, attention takes the rope and the writing of the cache before it.

    q = qcompile.rope_into_cache(q', k, v, cos, sin, K, V, at)
    y = qcompile.attention(q, K, V, mask)                      ->    y = qcompile.attention_into_cache(
                                                                         q', k, v, cos, sin, K, V, at, mask)

Why: a launch less, which moves a few kilobytes and which everything behind it waits for.

Where no kernel for this type of device has signed up, or the tokens are many, nothing is looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from qcompile.graph.alias import aliases, is_written_between
from qcompile.graph.match import Miss, is_call, only_user, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention
from qcompile.ops.attention_into_cache import attention_into_cache
from qcompile.ops.registry import MEANING, known
from qcompile.ops.rope import rope_into_cache


@dataclass(frozen=True)
class Step:
    """`root` is attention_into_cache of `operands`, and `turned` what went before."""

    root: Node
    turned: Node
    operands: tuple[Any, ...]


class FuseAttentionCache:
    name = "fuse_attention_cache"

    def match(self, node: Node) -> Step | Miss | None:
        if not is_call(node, attention.overload):
            return None
        args: Any = node.args
        turned, keys, values, mask, is_causal, *others = args
        if not is_call(turned, rope_into_cache.overload) or turned.args[5:7] != (keys, values) or is_causal:
            return None
        if len(turned.args) > 8:
            return None  # a quantized cache: that no kernel of one launch takes
        x = value(turned)
        if known(x.shape[2]) != 1 or not attention_into_cache.serves(x.device):
            return None
        if only_user(turned) is not node:
            return Miss(f"{turned.name} has another user", turned)
        for cache in (keys, values):
            users = (user for one in aliases(cache) for user in one.users)
            if other := next((user for user in users if turned < user < node), None):
                return Miss(f"{other.name} uses the cache before attention does", other)
        for operand in (*turned.args[:5], turned.args[7]):
            if is_written_between(operand, node):
                return Miss(f"{operand.name} is written to in between", node)
        operands = (*turned.args, mask, *others)
        choice = attention_into_cache.choose(*map_arg(operands, value))
        if choice.name == MEANING:
            return Miss("; ".join(reason for _, reason in choice.refusals), node)
        return Step(node, turned, operands)

    def rewrite(self, g: Rewriter, m: Step) -> None:
        with g.before(m.root):
            g.replace(m.root, g.call(attention_into_cache.overload, *m.operands))
        g.erase(m.root)
        g.erase(m.turned)
