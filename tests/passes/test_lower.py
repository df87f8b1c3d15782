"""lower."""

import pytest
import torch
from torch import nn

from qcompile.graph.match import module_path
from qcompile.ops.linear import linear
from qcompile.ops.norm import add_rms_norm
from qcompile.ops.registry import MEANING, Implementation
from qcompile.passes.lower import lower
from qcompile.passes.normalize import Normalize
from qcompile.passes.quantize_linear import QuantizeLinear


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """`kernels(a, b)`: the only implementations of linear in this test, at first none; of other ops there are none."""
    monkeypatch.setattr(add_rms_norm, "implementations", [])
    monkeypatch.setattr(linear, "implementations", [])
    return lambda *implementations: linear.implementations.extend(implementations)


@pytest.fixture
def quantized_graph(graph, side_by_side):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 8)
            side_by_side(self.layer)

        def forward(self, x):
            return self.layer(x).relu()

    return graph(Model(), torch.randn(3, 64)).prepare(Normalize(), QuantizeLinear())


def never_refuses(*args):
    return None


def test_meaning(quantized_graph):
    g = quantized_graph
    before = g.run()
    (record,) = lower(g.gm)
    torch.testing.assert_close(g.run(), before)
    assert (record.op, record.implementation, record.detail) == ("linear", MEANING, "u4/g64/asym")
    assert record.site.module == "layer" and record.refusals == ()
    assert g.count(linear.overload) == 0 and g.ops()[-1] == "relu"
    made = [node for node in g.gm.graph.nodes if node.meta.get("origin") == MEANING]
    assert made
    for node in made:
        assert "val" in node.meta and module_path(node) == "layer"
    assert lower(g.gm) == ()


def test_the_first_that_does_not_refuse(quantized_graph, kernels):
    def refuses(x, *rest):
        return f"never on {x.dim()} dimensions"

    def zeros(x, data, *rest):
        return x.new_zeros(x.shape[0], data.shape[0])

    kernels(Implementation("first", zeros, refuses), Implementation("second", zeros, never_refuses))
    kernels(Implementation("third", zeros, never_refuses))
    g = quantized_graph
    (record,) = lower(g.gm)
    assert record.implementation == "second"
    assert record.refusals == (("first", "never on 2 dimensions"),)
    assert torch.equal(g.run()[0], torch.zeros(3, 8))


def test_an_implementation_that_reads_a_constant(quantized_graph, kernels):
    table = torch.arange(8.0)
    kernels(Implementation("table", lambda x, *rest: x[:, :1] * table, never_refuses))
    g = quantized_graph
    lower(g.gm)
    torch.testing.assert_close(g.run()[0], (g.inputs[-1][:, :1] * table).relu())


def test_two_results(graph):
    def function(x, residual, weight):
        return [part.exp() for part in add_rms_norm(x, residual, weight, 1e-6, 0.0)]

    g = graph(function, *torch.randn(2, 3, 8), torch.randn(8))
    before = g.run()
    (record,) = lower(g.gm)
    torch.testing.assert_close(g.run(), before)
    assert record.op == "add_rms_norm" and record.detail == ""
    assert "getitem" not in g.ops()


def test_symbolic_sizes_stay_symbolic(quantized_graph):
    g = quantized_graph
    lower(g.gm)
    g.inputs[-1] = torch.randn(5, 64)
    assert g.run()[0].shape == (5, 8)
