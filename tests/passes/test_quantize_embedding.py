from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qcompile.graph.match import Miss
from qcompile.ops.linear import embedding
from qcompile.passes.quantize_embedding import QuantizeEmbedding
from qcompile.storage import Slot, install
from qcompile.stores import PackedWeight


def table(quantized: Callable, spec: str) -> nn.Embedding:
    module = nn.Embedding(50, 64)
    slot = Slot("packed_weight", 0, 50, (50, 64), False, torch.empty(0))
    install(module, {"weight": slot}, {"packed_weight": PackedWeight([quantized(50, 64, spec)])})
    return module


INDICES = torch.tensor([[3, 49, 0], [7, 7, 1]])


@pytest.mark.parametrize("spec", ["u4/g32/asym", "i8/row/sym", "u3/g64/asym_int"])
def test_only_the_rows_read_are_unpacked(graph: Callable, quantized: Callable, golden: Callable, spec: str) -> None:
    captured = graph(table(quantized, spec), INDICES)
    want = captured.run()
    result = captured.apply(QuantizeEmbedding())
    assert len(result.rewrites) == 1 and captured.count(embedding.overload) == 1
    assert torch.equal(captured.run()[0], want[0])
    if spec == "u4/g32/asym":
        golden("passes/quantize_embedding", captured.text())


def test_a_dense_table_is_not_our_business(graph: Callable) -> None:
    captured = graph(nn.Embedding(50, 64), INDICES)
    assert [QuantizeEmbedding().match(node) for node in captured.gm.graph.nodes] == [None] * len(
        captured.gm.graph.nodes
    )


def test_rows_without_scales_of_their_own(graph: Callable, quantized: Callable) -> None:
    captured = graph(table(quantized, "u4/tensor/asym"), INDICES)
    found = [QuantizeEmbedding().match(node) for node in captured.gm.graph.nodes]
    (miss,) = [m for m in found if isinstance(m, Miss)]
    assert miss.reason == "rows of the table do not carry their own scales"
