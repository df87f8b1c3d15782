"""quantize_linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcompile.normal import normalizing_passes
from qcompile.ops.linear import dequantize, linear
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.storage import Slot, install
from qcompile.stores import PackedWeight

BEFORE = normalizing_passes()


def test_text(graph, side_by_side, golden):
    module = nn.Linear(64, 8)
    side_by_side(module)
    g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
    before = g.text()
    g.apply(QuantizeLinear())
    golden("passes/quantize_linear", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("spec", ["u4/g64/asym", "i8/row/sym", "u3/g32/asym_int", "i8/tensor/sym"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_quantized(graph, side_by_side, spec, dtype):
    module = nn.Linear(64, 8, dtype=dtype)
    side_by_side(module, spec=spec)
    g = graph(module, torch.randn(2, 3, 64, dtype=dtype)).prepare(*BEFORE)
    result = g.apply(QuantizeLinear())
    assert g.ops() == ["linear"] and g.count(linear.overload) == 1 and not result.misses


def test_transposed_weight(graph, quantized):
    """GPT-2's Conv1D keeps (in_features, out_features) and calls addmm between two views."""
    module = Conv1D(8, 64)
    slot = Slot("packed", 0, 8, (64, 8), True, torch.empty(0))
    install(module, {"weight": slot}, {"packed": PackedWeight([quantized(8, 64)])})
    g = graph(module, torch.randn(2, 3, 64)).prepare(*BEFORE)
    g.apply(QuantizeLinear(), rtol=1e-5, atol=1e-5)
    assert g.ops() == ["linear"] and g.count(linear.overload) == 1


def test_one_weight_in_two_linears(graph, side_by_side):
    module = nn.Linear(64, 64)
    side_by_side(module)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(self.inner(x))

    g = graph(Twice(), torch.randn(3, 64)).prepare(*BEFORE)
    g.apply(QuantizeLinear(), rtol=1e-4, atol=1e-3)
    assert g.ops() == ["linear", "linear"]


def test_a_weight_that_is_also_read_otherwise(graph, side_by_side):
    module = nn.Linear(64, 8, bias=False)
    side_by_side(module)

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            weight = self.inner.weight
            return F.linear(x, weight), weight.sum()

    g = graph(Penalty(), torch.randn(3, 64)).prepare(*BEFORE)
    g.apply(QuantizeLinear(), rtol=1e-5, atol=1e-5)
    assert g.ops() == ["dequantize", "linear", "sum"]


def test_a_dense_linear_is_left_alone(graph):
    g = graph(nn.Linear(64, 8), torch.randn(3, 64)).prepare(*BEFORE)
    result = g.apply(QuantizeLinear())
    assert not result.rewrites and not result.misses


def test_miss_dtype(graph, side_by_side):
    module = nn.Linear(64, 8, bias=False)
    side_by_side(module)
    g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
    # A linear of two dtypes does not run, but a matmul under autocast is captured so.
    (x,) = g.gm.graph.find_nodes(op="placeholder")[-1:]
    x.meta["val"] = x.meta["val"].bfloat16()
    (reason,) = [reason for reason, _ in g.apply(QuantizeLinear()).misses]
    assert reason == "x is torch.bfloat16, the weight unpacks to torch.float32"


def test_miss_dimensions(graph, quantized):
    w = quantized(1, 64)

    def function(x, data, scale, zero):
        return F.linear(x, dequantize(data, scale, zero, "u4/g64/asym", [64], torch.float32))

    g = graph(function, torch.randn(3, 64), w.data, w.scale, w.zero).prepare(*BEFORE)
    (reason,) = [reason for reason, _ in g.apply(QuantizeLinear()).misses]
    assert reason == "the weight has 1 dimensions"
