"""Attention over a quantized cache reads its codes.

    k = qcompile.dequantize_rows(K, s)
    v = qcompile.dequantize_rows(V, t)
    y = qcompile.attention(q, k, v, mask, …)                  ->        y = qcompile.attention(q, K, V, mask, …, s, t)

Why: a step of decoding takes the time of reading the cache, and numbers written out would be read again, twice as wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import is_written_between
from qcompile.graph.match import Miss, argument, is_call
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention
from qcompile.ops.row_codes import dequantize_rows


@dataclass(frozen=True)
class Codes:
    """The value of `root`: attention of `operands`."""

    root: Node
    operands: tuple[Any, ...]


class FuseAttentionCodes:
    name = "fuse_attention_codes"

    def match(self, node: Node) -> Codes | Miss | None:
        if not is_call(node, attention.overload):
            return None
        args: Any = node.args
        query, key, value, *others = args[:6]
        if not is_call(key, dequantize_rows.overload) or not is_call(value, dequantize_rows.overload):
            return None
        (keys, key_scale), (values, value_scale) = key.args[:2], value.args[:2]
        for x in (keys, key_scale, values, value_scale):
            if is_written_between(x, node):
                return Miss(f"{x.name} is written to in between", node)
        softcap = argument(node, 6, "softcap")
        return Codes(node, (query, keys, values, *others, softcap, key_scale, value_scale))

    def rewrite(self, g: Rewriter, m: Codes) -> None:
        with g.before(m.root):
            g.replace(m.root, g.call(attention.overload, *m.operands))
