"""fuse_norm: the residual sum before a norm becomes part of it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.normal import normalizing_passes
from qcompile.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from qcompile.passes.fuse_norm import FuseNorm
from qcompile.passes.recognize_norm import RecognizeNorm

BEFORE = (*normalizing_passes(), RecognizeNorm())


class Norms(nn.Module):
    """`function(norm, weight, a, b)` with an RMS norm over a width of 8, or a layer norm."""

    def __init__(self, function, kind=nn.RMSNorm, dtype=torch.float32):
        super().__init__()
        self.function = function
        self.norm = kind(8, eps=1e-5, dtype=dtype)
        nn.init.normal_(self.norm.weight)

    def forward(self, *inputs):
        return self.function(self.norm, *inputs)


def stream(norm, a, b):
    """Half a decoder layer: the sum goes on beside the norm."""
    total = a + b
    return total + norm(total).tanh()


@pytest.fixture
def fused(graph):
    def run(function, kind=nn.RMSNorm, dtype=torch.float32, inputs=None):
        inputs = torch.randn(2, 3, 5, 8).to(dtype) if inputs is None else inputs
        g = graph(Norms(function, kind, dtype), *inputs).prepare(*BEFORE)
        return g, g.apply(FuseNorm())

    return run


def test_text(graph, golden):
    g = graph(Norms(stream, dtype=torch.bfloat16), *torch.randn(2, 3, 5, 8).bfloat16()).prepare(*BEFORE)
    before = g.text()
    g.apply(FuseNorm())
    golden("passes/fuse_norm", f"{before}\nbecomes\n\n{g.text()}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("kind", "op"), [(nn.RMSNorm, add_rms_norm), (nn.LayerNorm, add_layer_norm)])
@pytest.mark.parametrize(
    "function",
    [
        stream,
        lambda norm, a, b: norm(a + b),
        lambda norm, a, b: (norm(b + a), a, b),
        lambda norm, a, b: (total := torch.add(a, b), total.exp(), norm(total))[1:],
        lambda norm, a, b: norm(torch.add(a.tanh(), b, alpha=1)),
        lambda norm, a, b: norm((a + b).to(a.dtype)),
    ],
)
def test_sums(fused, function, kind, op, dtype):
    """Equal numbers, bit for bit: the sum is rounded before it is normalized."""
    g, result = fused(function, kind, dtype)
    assert len(result.rewrites) == g.count(op.overload) == 1 and not result.misses
    assert not {"rms_norm", "layer_norm"} & set(g.ops())


def test_bf16_rounds_once(fused):
    a, b = torch.randn(2, 3, 5, 8).bfloat16()
    g, _ = fused(lambda norm, a, b: norm(a + b), dtype=torch.bfloat16, inputs=(a, b))
    got, weight = g.run()[0], g.inputs[0]
    want = F.rms_norm((a + b).double(), (8,), weight.double(), 1e-5)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-8)


def test_a_chain_of_layers_holds_one_stream(fused):
    def layers(norm, x, y):
        for _ in range(3):
            x = x + y
            y = norm(x).tanh()
        return norm(x + y)

    g, result = fused(layers)
    assert len(result.rewrites) == g.count(add_rms_norm.overload) == 4 and "add" not in g.ops()


def test_of_two_norms_of_one_sum_the_first_makes_it(fused):
    """Attention and MLP side by side, as in GPT-NeoX."""
    g, result = fused(lambda norm, a, b: ((total := a + b), norm(total), F.rms_norm(total, (8,))))
    assert len(result.rewrites) == 1 and not result.misses
    assert g.ops() == ["add_rms_norm", "getitem", "getitem", "rms_norm"]


def test_a_weight_computed_after_the_sum(fused):
    """Nemotron adds one to the weight of a layer norm at every call."""
    g, result = fused(lambda norm, a, b: F.layer_norm(a + b, (8,), norm.weight + 1))
    assert len(result.rewrites) == 1 and g.ops() == ["add", "add_layer_norm", "getitem"]


def test_the_new_node_is_the_norms(fused):
    g, _ = fused(stream)
    new = [node for node in g.gm.graph.nodes if node.target in (add_rms_norm.overload, operator.getitem)]
    assert len(new) == 3 and {node.meta["module_path"] for node in new} == {"norm"}


def test_misses_a_broadcast_term(fused):
    for inputs in ((torch.randn(3, 5, 8), torch.randn(5, 8)), (torch.randn(8), torch.randn(3, 5, 8))):
        _, result = fused(stream, inputs=inputs)
        ((reason, _),) = result.misses
        assert not result.rewrites and " is f32[" in reason and "the sum is f32[" in reason


def test_misses_a_term_of_another_dtype(fused):
    _, result = fused(stream, inputs=(torch.randn(3, 8), torch.randn(3, 8).bfloat16()))
    ((reason, _),) = result.misses
    assert not result.rewrites and "bf16[" in reason


def test_misses_a_weighted_sum(fused):
    _, result = fused(lambda norm, a, b: norm(torch.add(a, b, alpha=2)))
    assert not result.rewrites and [reason for reason, _ in result.misses] == ["the sum is weighted"]


def test_misses_a_weight_that_comes_too_late(fused):
    _, result = fused(lambda norm, a, b: F.rms_norm(total := a + b, (8,), total.mean((0, 1)), 1e-5))
    assert not result.rewrites and [reason for reason, _ in result.misses] == ["mean is computed after the sum is read"]


def test_misses_a_sum_that_is_written_to(fused):
    def written(norm, a, b):
        total = a + b
        cut = total[:1]
        cut.mul_(2.0)
        return norm(total)

    _, result = fused(written)
    assert not result.rewrites
    assert [reason for reason, _ in result.misses] == ["the sum or a term of it is written to in place"]


def test_misses_a_term_that_is_written_to_before_the_sum_is_read(fused):
    def written(norm, a, b):
        b = b.tanh()
        total = a + b
        b[:1].mul_(2.0)
        return norm(total), b

    g, result = fused(written)
    assert not result.rewrites
    assert [reason for reason, _ in result.misses] == ["the sum or a term of it is written to in place"]


@pytest.mark.parametrize(
    "function",
    [
        lambda norm, a, b: norm(a) + b,
        lambda norm, a, b: norm(a - b),
        lambda norm, a, b: norm(a + 1.0),
        lambda norm, a, b: norm((a + b).tanh()),
        lambda norm, a, b: norm((a + b).unflatten(0, (3, 1))),
    ],
)
def test_not_a_sum_before_a_norm(fused, function):
    g, result = fused(function)
    assert not result.rewrites and not result.misses and g.count(rms_norm.overload, layer_norm.overload) == 1
