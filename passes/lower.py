"""Choose an implementation for every qcompile op and trace it into the graph.

    y = qcompile.linear(x, …)                ->        y = <nodes of the first implementation that does not refuse>

Why: after this the graph holds only what Inductor compiles or calls; the choice and the refusals are on record.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from qcompile.graph.capture import Inliner
from qcompile.graph.match import module_path, value
from qcompile.graph.rewrite import Site
from qcompile.ops.registry import OPS, Op


@dataclass(frozen=True)
class Lowered:
    """What became of one op call. `detail` is the spec where there is one."""

    op: str
    implementation: str
    detail: str
    site: Site
    refusals: tuple[tuple[str, str], ...]


def lower(gm: GraphModule) -> tuple[Lowered, ...]:
    """Replace every qcompile op in place; returns one record a call, in graph order."""
    by_overload: dict[object, Op] = {op.overload: op for op in OPS.values()}
    inliner, records = Inliner(gm), []
    for node in list(gm.graph.nodes):
        op = by_overload.get(node.target)
        if op is None:
            continue
        choice = op.choose(*map_arg(node.args, value))
        records.append(Lowered(op.name, choice.name, _spec(node), Site(node.name, module_path(node)), choice.refusals))
        for new in inliner.inline(node, choice.function):
            new.meta["origin"] = choice.name
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return tuple(records)


def _spec(node: Node) -> str:
    return " by ".join(arg for arg in node.args if isinstance(arg, str) and "/" in arg)
