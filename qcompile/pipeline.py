"""Which passes run, in which order, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from qcompile.graph.dump import dump, write_dump
from qcompile.graph.rewrite import PassResult, Rule, apply
from qcompile.passes.lower import Lowered, lower
from qcompile.passes.quantize_linear import QuantizeLinear


@dataclass(frozen=True)
class Outcome:
    """What the pipeline did to one graph."""

    passes: tuple[PassResult, ...]
    lowered: tuple[Lowered, ...]
    text: str


def default_passes() -> list[Rule[Any]]:
    return [QuantizeLinear()]


@dataclass
class Pipeline:
    """Passes, dump folder and Inductor options, ready to run on graphs."""

    passes: Sequence[Rule[Any]] = field(default_factory=default_passes)
    dump: Path | None = None
    inductor_options: dict[str, Any] = field(default_factory=dict)

    def transform(self, gm: GraphModule) -> Outcome:
        results = []
        for rule in self.passes:
            results.append(apply(gm, rule))
        text = dump(gm.graph)
        return Outcome(tuple(results), lower(gm), text)
