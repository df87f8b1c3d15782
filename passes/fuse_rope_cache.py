"""What a step does between its projections and attention becomes one op.

    q = qcompile.rope(q', cos, sin)                           q = qcompile.rope_into_cache(
    K' = index_copy_(K, 2, at, qcompile.rope(k, cos, sin))            q', k, v, cos, sin, K, V, at)
    V' = index_copy_(V, 2, at, v)                     ->
    y = qcompile.attention(q, K', V', …)                      y = qcompile.attention(q, K, V, …)

A quantized cache is four tensors, of codes and of scales, and what is written to them comes from quantize_rows. Scales
that are fixed are only read, and codes come from quantize_rows_by.

Why: at a token of decoding these are four launches that move a few kilobytes.

The op writes to K and V, as the calls that it replaces do. Inductor keeps such a write in place where the cache is an
input of the graph (torch 2.11 and 2.13: no copies), and an op that is functional could not write at all.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qcompile.graph.alias import aliases, is_written_between
from qcompile.graph.match import Miss, aten, is_call, only_user
from qcompile.graph.rewrite import Rewriter
from qcompile.ops.attention import attention
from qcompile.ops.rope import rope, rope_into_cache
from qcompile.ops.row_codes import quantize_rows, quantize_rows_by


@dataclass(frozen=True)
class Turned:
    """`root` is attention of `query`, a rope, over what `writes` left in `caches`."""

    root: Node
    query: Node
    writes: tuple[Node, ...]
    caches: tuple[Node, ...]
    operands: tuple[Node, ...]


class FuseRopeCache:
    name = "fuse_rope_cache"

    def match(self, node: Node) -> Turned | Miss | None:
        if not is_call(node, attention.overload):
            return None
        args: Any = node.args
        query, *writes = args[:3]
        scales = [scale for scale in args[7:9] if scale is not None]
        if not (fixed := bool(scales) and not any(map(_is_write, scales))):
            writes += scales
        if not is_call(query, rope.overload) or not all(_is_write(write) for write in writes):
            return None
        caches, _, (positions, *others), rows = zip(*(write.args for write in writes))
        if fixed:
            key, value = (_quantized_by(new, scale, positions) for new, scale in zip(rows, scales))
            caches = (*caches, *scales)
        else:
            key, value = rows if len(rows) == 2 else map(_quantized, rows[:2], rows[2:])
        if not is_call(key, rope.overload) or value is None:
            return None
        if key.args[1:] != query.args[1:]:
            return Miss("queries and keys are turned by different angles", node)
        if any(other is not positions for other in others):
            return Miss("keys and values are written at different positions", node)
        for x in (query, key):
            if only_user(x) is None:
                return Miss(f"{x.name} has another user", x)
        for write in writes:
            if (other := _reader_between(write, node)) is not None:
                return Miss(f"{other.name} reads the cache before attention does", other)
        read = (query.args[0], key.args[0], value, *query.args[1:])
        for x in (*read, positions):
            if is_written_between(x, node):
                return Miss(f"{x.name} is written to in between", node)
        operands = (*read, *caches[:2], positions, *caches[2:], *([fixed] if fixed else ()))
        return Turned(node, query, tuple(writes), caches, operands)

    def rewrite(self, g: Rewriter, m: Turned) -> None:
        with g.before(m.root):
            g.replace(m.query, g.call(rope_into_cache.overload, *m.operands))
            for write, cache in zip(m.writes, m.caches):
                g.replace(write, cache)
                g.erase(write)


def _is_write(node: Any) -> bool:
    return is_call(node, aten.index_copy_.default) and node.args[1] in (2, -2)


def _quantized(codes: Any, scale: Any) -> Any:
    """What quantize_rows made both of these of, or None."""
    if not is_call(codes, operator.getitem) or not is_call(scale, operator.getitem):
        return None
    (source, first), (other, second) = codes.args, scale.args
    is_one = is_call(source, quantize_rows.overload) and source is other and (first, second) == (0, 1)
    return source.args[0] if is_one else None


def _quantized_by(codes: Any, scales: Any, positions: Any) -> Any:
    """What quantize_rows_by made codes of by the scales at these positions, or None."""
    if not is_call(codes, quantize_rows_by.overload) or not is_call(codes.args[1], aten.index_select.default):
        return None
    source, dim, at = codes.args[1].args
    return codes.args[0] if source is scales and dim in (2, -1) and at is positions else None


def _reader_between(write: Node, end: Node) -> Node | None:
    """What uses the memory that `write` writes to, after it and before `end`; fuse_attention leaves no other writes."""
    users = (user for one in aliases(write) for user in one.users)
    return next((user for user in users if write < user < end), None)
