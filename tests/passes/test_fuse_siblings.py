"""fuse_siblings."""

import pytest
import torch
from torch import nn

from qcompile.graph.match import aten
from qcompile.ops.linear import linear
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.normalize import Normalize
from qcompile.passes.normalize_views import NormalizeViews
from qcompile.passes.quantize_linear import QuantizeLinear

WIDTHS = (8, 4, 4)


class Qkv(nn.Module):
    def __init__(self, bias=False, columns=64, widths=WIDTHS):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(columns, width, bias=bias) for width in widths])

    def forward(self, x):
        return [part(x) for part in self.parts]


@pytest.fixture
def fused(graph):
    """Capture, quantize and fuse; returns the graph and the result of the pass."""

    def run(module, *inputs):
        g = graph(module, *inputs).prepare(Normalize(), NormalizeViews(), QuantizeLinear())
        return g, g.apply(FuseSiblings(), rtol=1e-5, atol=1e-5)

    return run


def reasons(result):
    return [reason for reason, _ in result.misses]


def test_text(graph, side_by_side, golden):
    module = Qkv(widths=(8, 4))
    side_by_side(*module.parts)
    g = graph(module, torch.randn(3, 64)).prepare(Normalize(), NormalizeViews(), QuantizeLinear())
    before = g.text()
    g.apply(FuseSiblings(), rtol=1e-5, atol=1e-5)
    golden("passes/fuse_siblings", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u4/g32/asym_int", "i8/row/sym", "u3/g64/asym", "i4/g64/sym"])
def test_one_linear(fused, side_by_side, spec):
    module = Qkv()
    side_by_side(*module.parts, spec=spec)
    g, result = fused(module, torch.randn(2, 5, 64))
    assert len(result.rewrites) == 1 and not result.misses
    assert g.ops() == ["linear", "narrow", "narrow", "narrow"]
    (wide,) = g.gm.graph.find_nodes(op="call_function", target=linear.overload)
    assert all(wide.args[i].op == "placeholder" for i in (1, 2)), "the whole buffers are read"


def test_stored_in_another_order(fused, side_by_side):
    module = Qkv()
    q, k, v = module.parts
    side_by_side(v, q, k)
    g, _ = fused(module, torch.randn(3, 64))
    assert g.ops() == ["linear", "narrow", "narrow", "narrow"]
    assert [n.args[2] for n in g.gm.graph.find_nodes(op="call_function", target=aten.narrow.default)] == [0, 4, 12]


def test_a_part_of_the_buffer(fused, side_by_side):
    """The store holds a fourth linear, which reads something else."""
    module = Qkv()
    other = nn.Linear(64, 4, bias=False)
    side_by_side(other, *module.parts)
    g, result = fused(module, torch.randn(3, 64))
    assert len(result.rewrites) == 1
    assert g.ops() == ["narrow"] * 3 + ["linear"] + ["narrow"] * 3


def test_biases_side_by_side(fused, side_by_side):
    module = Qkv(bias=True)
    side_by_side(*module.parts)
    g, _ = fused(module, torch.randn(3, 64))
    assert g.ops() == ["linear", "narrow", "narrow", "narrow"]


def test_biases_apart(fused, side_by_side):
    module = Qkv(bias=True)
    side_by_side(*module.parts, biases=False)
    g, _ = fused(module, torch.randn(3, 64))
    assert g.ops() == ["cat", "linear", "narrow", "narrow", "narrow"]


def test_one_scale_for_all(fused, quantized):
    whole = quantized(16, 64, "i8/tensor/sym")

    class PerTensor(nn.Module):
        def __init__(self):
            super().__init__()
            self.data, self.scale = nn.Buffer(whole.data), nn.Buffer(whole.scale)

        def forward(self, x):
            a, b = self.data.narrow(0, 0, 12), self.data.narrow(0, 12, 4)
            return [linear(x, part, self.scale, None, None, "i8/tensor/sym", None) for part in (a, b)]

    g, result = fused(PerTensor(), torch.randn(3, 64))
    assert g.ops() == ["linear", "narrow", "narrow"] and not result.misses


def test_two_stores_that_read_one_value(fused, side_by_side):
    """Parallel attention and MLP."""
    module = Qkv(widths=(8, 4, 4, 16, 16))
    side_by_side(*module.parts[:3])
    side_by_side(*module.parts[3:])
    g, result = fused(module, torch.randn(3, 64))
    assert len(result.rewrites) == 2 and not result.misses
    assert g.count(linear.overload) == 2


def test_two_values(fused, side_by_side):
    """Cross attention: one store, but the keys read something else."""
    module = Qkv(widths=(8, 4))
    side_by_side(*module.parts)
    q, k = module.parts
    g, result = fused(lambda x, y: (q(x), k(y)), torch.randn(3, 64), torch.randn(3, 64))
    assert g.count(linear.overload) == 2 and not result.misses


def test_one_linear_is_no_sibling(fused, side_by_side):
    module = Qkv(widths=(8,))
    side_by_side(*module.parts)
    _, result = fused(module, torch.randn(3, 64))
    assert not result.rewrites and not result.misses


def test_miss_apart(fused, side_by_side):
    module = Qkv()
    for part in module.parts:
        side_by_side(part)
    _, result = fused(module, torch.randn(3, 64))
    assert not result.rewrites
    assert reasons(result) == ["siblings are not stored side by side"]


def test_miss_one_apart(fused, side_by_side):
    module = Qkv()
    side_by_side(*module.parts[:2])
    side_by_side(module.parts[2])
    _, result = fused(module, torch.randn(3, 64))
    assert len(result.rewrites) == 1
    assert reasons(result) == ["siblings are not stored side by side"]
    assert result.misses[0][1].module == "parts.2"


def test_miss_gap(fused, side_by_side):
    module = Qkv()
    side_by_side(*module.parts)
    q, _, v = module.parts
    _, result = fused(lambda x: (q(x), v(x)), torch.randn(3, 64))
    assert reasons(result) == ["siblings are not stored side by side"]


def test_miss_specs(fused, side_by_side):
    module = Qkv(widths=(8, 4))
    side_by_side(module.parts[0], spec="u4/g64/asym")
    side_by_side(module.parts[1], spec="u8/row/asym")
    _, result = fused(module, torch.randn(3, 64))
    assert reasons(result) == ["siblings are u4/g64/asym and u8/row/asym"]


def test_miss_shared_weight(fused, side_by_side):
    module = Qkv(widths=(8, 4))
    side_by_side(*module.parts)
    q, k = module.parts
    _, result = fused(lambda x: (q(x), k(x), q(x) + 1), torch.randn(3, 64))
    assert not result.rewrites
    assert reasons(result) == ["two siblings share a weight"]


def test_miss_one_bias(fused, side_by_side):
    module = Qkv(widths=(8, 4))
    module.parts[1].bias = nn.Parameter(torch.randn(4))
    side_by_side(*module.parts)
    _, result = fused(module, torch.randn(3, 64))
    assert reasons(result) == ["a sibling has a bias and another has none"]


def test_miss_activation(fused, quantized):
    w = quantized(16, 64)

    def function(x, data, scale, zero):
        def rows(start, count, activation):
            parts = [t.narrow(0, start, count) for t in (data, scale, zero)]
            return linear(x, *parts, None, "u4/g64/asym", activation)

        return rows(0, 8, None), rows(8, 8, "silu")

    _, result = fused(function, torch.randn(3, 64), w.data, w.scale, w.zero)
    assert reasons(result) == ["a sibling has an activation"]


def test_miss_scales(fused, quantized):
    w = quantized(16, 64, "i8/row/sym")

    def function(x, data, a, b):
        narrow = data.narrow
        return [linear(x, narrow(0, 8 * i, 8), s, None, None, "i8/row/sym", None) for i, s in enumerate((a, b))]

    _, result = fused(function, torch.randn(3, 64), w.data, w.scale[:8].clone(), w.scale[8:].clone())
    assert reasons(result) == ["siblings have scales of their own"]


def test_miss_written_in_place(fused, side_by_side):
    module = Qkv(widths=(8, 4))
    side_by_side(*module.parts)
    q, k = module.parts

    def function(x):
        a = q(x)
        return a, k(x.add_(1))

    g, result = fused(function, torch.randn(3, 64))
    assert not result.rewrites and not result.misses, "the second reads the result of the write"
    assert g.count(linear.overload) == 2

    def later(x):
        results = q(x), k(x)
        x.add_(1)
        return results

    _, result = fused(later, torch.randn(3, 64))
    assert reasons(result) == ["the siblings read a tensor that is written in place"]


def test_miss_computed_behind(fused, side_by_side):
    module = Qkv(widths=(8, 4), bias=True)
    side_by_side(*module.parts, biases=False)
    q, k = module.parts
    assert isinstance(k, nn.Linear)

    def function(x, b):
        first = q(x)
        return first, nn.functional.linear(x, k.weight, b.exp())

    _, result = fused(function, torch.randn(3, 64), torch.randn(4))
    assert reasons(result) == ["a weight or bias is computed behind the first sibling"]


def test_miss_dense(fused):
    _, result = fused(Qkv(), torch.randn(3, 64))
    assert reasons(result) == ["the weights are dense and not stored side by side"]


def test_dense_linears_that_are_no_siblings(fused):
    class Chain(Qkv):
        def forward(self, x):
            a, b = self.parts
            return b(a(x)), a(x)

    _, result = fused(Chain(widths=(64, 64)), torch.randn(3, 64))
    assert not result.misses
