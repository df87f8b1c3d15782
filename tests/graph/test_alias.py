"""alias: who shares memory with whom."""

import torch
from torch import nn

from qcompile.graph import capture
from qcompile.graph.alias import (
    aliases,
    is_returned,
    is_written,
    is_written_between,
    shared_operand,
    shares_input,
    storage,
)


class Flat(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def nodes(function, *inputs):
    """All nodes by name."""
    graph = capture.export(Flat(function).eval(), inputs).gm.graph
    return {node.name: node for node in graph.nodes if node.op != "output"}


def test_views_share():
    n = nodes(lambda x: x.view(-1).unsqueeze(0).exp(), torch.randn(3, 4))
    assert shared_operand(n["view"]) is n["tensors_0"]
    assert shared_operand(n["exp"]) is None and shared_operand(n["tensors_0"]) is None
    assert storage(n["unsqueeze"]) is n["tensors_0"] and storage(n["exp"]) is n["exp"]
    assert set(aliases(n["view"])) == {n["tensors_0"], n["view"], n["unsqueeze"]}


def test_parts_and_undeclared_views_share():
    def function(x):
        a, b = x.chunk(2, -1)
        return nn.functional.dropout(a, 0.1, False).exp() + b.type_as(b).exp()

    n = nodes(function, torch.randn(3, 4))
    assert {"chunk", "getitem", "getitem_1", "dropout", "type_as"} <= {node.name for node in aliases(n["tensors_0"])}


def test_writes():
    def function(x, y):
        x.view(-1)[1:].add_(1)
        return x.exp() + y.exp()

    n = nodes(function, torch.randn(3, 4), torch.randn(3, 4))
    assert is_written(n["tensors_0"]) and is_written(n["view"])
    assert not is_written(n["tensors_1"]) and not is_written(n["exp"])


def test_a_written_argument_is_not_a_read_one():
    def function(cache, index, new):
        cache.index_copy_(0, index, new)
        return new.exp()

    n = nodes(function, torch.randn(5, 4), torch.tensor([1, 3]), torch.randn(2, 4))
    assert is_written(n["tensors_0"]) and not is_written(n["tensors_2"])


def test_written_between():
    def function(x):
        a = x.exp()
        x.add_(1)
        return a, x.sin()

    n = nodes(function, torch.randn(3, 4))
    assert is_written_between(n["tensors_0"], n["sin"])
    assert not is_written_between(n["tensors_0"], n["exp"])


def test_returned():
    def function(x, y):
        return x.view(-1), y.exp().sum()

    n = nodes(function, torch.randn(3, 4), torch.randn(3, 4))
    assert is_returned(n["tensors_0"]) and is_returned(n["sum_1"])
    assert not is_returned(n["exp"]) and not is_returned(n["tensors_1"])


def test_inputs_that_are_views_of_one_tensor():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    n = nodes(lambda x, part, y: x[0] + part + y[0], x, x[1], y)
    assert [shares_input(n[f"tensors_{i}"]) for i in range(3)] == [True, True, False]
