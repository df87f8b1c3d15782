"""Choose an implementation for every qcompile op and trace it into the graph.

    y = qcompile.linear(x, …)                ->        y = <nodes of the first implementation that does not refuse>

Why: after this the graph holds only what Inductor compiles or calls; the choice and the refusals are on record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule
from torch.fx.node import map_arg

from qcompile.graph.capture import Inliner
from qcompile.graph.match import module_path, value
from qcompile.graph.rewrite import Site
from qcompile.ops.chain import Step, chain
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
        site = Site(node.name, module_path(node))
        records += [Lowered(name, choice.name, spec, site, choice.refusals) for name, spec in _calls(op, node.args)]
        for new in inliner.inline(node, choice.function):
            new.meta["origin"] = choice.name
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return tuple(records)


def _calls(op: Op, args: Sequence[Any]) -> list[tuple[str, str]]:
    """An op and the spec among its arguments; of a chain its steps as well."""
    if op is not chain:
        return [(op.name, " by ".join(arg for arg in args if isinstance(arg, str) and "/" in arg))]
    steps = map(Step.parse, args[2].split("\n"))
    return [(op.name, ""), *(call for step in steps for call in _calls(OPS[step.op], step.arguments))]
