"""The passes that bring a graph to one spelling, in order; planning and the pipeline both start with them."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph

from qcompile.graph.rewrite import Rule, apply
from qcompile.passes.normalize import Normalize
from qcompile.passes.normalize_linear import NormalizeLinear
from qcompile.passes.normalize_rows import NormalizeRows
from qcompile.passes.normalize_views import NormalizeViews
from qcompile.passes.remove_in_place import RemoveInPlace
from qcompile.passes.share_rounding import ShareRounding


def normalizing_passes() -> list[Rule[Any]]:
    """Fresh passes. A value that is written in place is left alone by the others; linears are recognised by the views
    around them; rows are seen through once products are linears."""
    return [RemoveInPlace(), Normalize(), NormalizeViews(), NormalizeLinear(), NormalizeRows(), ShareRounding()]


def normalize(graph: Graph) -> None:
    """Bring a captured graph to one spelling, in place."""
    for rule in normalizing_passes():
        apply(graph, rule)
