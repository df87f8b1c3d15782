"""remove_in_place."""

import pytest
import torch
from torch import nn

from qcompile.graph.match import aten
from qcompile.passes.remove_in_place import RemoveInPlace


def test_text(graph, golden):
    g = graph(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(2, 4))
    before = g.text()
    g.apply(RemoveInPlace())
    golden("passes/remove_in_place", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: (x + 1).relu_(), ["add", "relu"]),
        (lambda x: (x + 1).mul_(x).add_(2).clamp_(0, 1), ["add", "mul", "add", "clamp"]),
        (lambda x: (x + 1).masked_fill_(x > 0, 0.5), ["add", "gt", "masked_fill"]),
        (lambda x: (x > 0).mul_(x > 1), ["gt", "gt", "mul"]),
    ],
)
def test_removed(graph, function, ops):
    g = graph(function, torch.randn(2, 4))
    g.apply(RemoveInPlace())
    assert g.ops() == ops


def test_result_keeps_the_dtype_of_its_operand(graph):
    g = graph(lambda x, y: (x + 1).add_(y), torch.randn(2, 4, dtype=torch.float16), torch.randn(2, 4))
    g.apply(RemoveInPlace())
    assert g.ops() == ["add", "add", "to"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.add_(1),  # the caller's tensor
        lambda x: (x + 1).view(-1)[2:].relu_(),  # a view
        lambda x: [y := x + 1, y.relu_(), y.sum()][2],  # a second user
        lambda x: (x + 1).bernoulli_(0.5) * 0,  # random
    ],
)
def test_left_alone(graph, function):
    g = graph(function, torch.randn(2, 4))
    if "sum" in g.ops():
        # Tracing gives the in-place result to later readers; as a program may, let one read the operand again.
        (add,) = g.gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        (total,) = g.gm.graph.find_nodes(op="call_function", target=aten.sum.default)
        total.args = (add,)
        g.gm.recompile()
    before = g.ops()
    g.apply(RemoveInPlace())
    assert g.ops() == before
