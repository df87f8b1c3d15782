"""Lookups in a table that is unpacked from codes unpack only the rows they read.

    w = dequantize(codes, scale, zero)
    y = embedding(w, indices)                ->        y = qcompile.embedding(indices, codes, scale, zero)

Why: a token reads one row; the float table never exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.match import Miss, aten, is_call, value
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.linear import dequantize, embedding


@dataclass(frozen=True)
class UnpackedTable:
    embedding: Node
    table: Node
    indices: Node


class QuantizeEmbedding:
    name = "quantize_embedding"

    def match(self, node: Node) -> UnpackedTable | Miss | None:
        if not is_call(node, aten.embedding.default):
            return None
        table: Any = node.args[0]
        indices: Any = node.args[1]
        if not is_call(table, dequantize.overload):
            return None
        data, scale = table.args[0], table.args[1]
        if value(scale).shape[0] != value(data).shape[0]:
            return Miss("rows of the table do not carry their own scales", node)
        return UnpackedTable(node, table, indices)

    def rewrite(self, g: Rewriter, m: UnpackedTable) -> None:
        data, scale, zero, spec = m.table.args[:4]
        weight = value(m.table)
        with g.before(m.embedding):
            new = g.call(embedding.overload, m.indices, data, scale, zero, spec, weight.shape[1], weight.dtype)
        g.replace(m.embedding, new)
