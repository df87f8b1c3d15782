"""round_activation."""

import copy

import pytest
import torch
from torch import nn

import qcompile
from qcompile.normal import normalizing_passes
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.round_activation import RoundActivation
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import INPUT_ROUNDING, packed_parameters, put_rounding
from qcompile.stores import ActivationRounding

SPEC = "i8/token/dynamic"
BEFORE = (*normalizing_passes(), QuantizeLinear())


def test_text(graph, siblings, golden):
    g = graph(siblings, torch.randn(3, 64)).prepare(*BEFORE)
    before = g.text()
    g.apply(RoundActivation(SPEC), rtol=0.1, atol=0.5)
    golden("passes/round_activation", f"{before}\nbecomes\n\n{g.text()}")
    assert len(g.apply(FuseSiblings()).rewrites) == 1


def test_what_the_checkpoint_asks_for_stays(graph, side_by_side):
    module = nn.Linear(64, 8)
    side_by_side(module)
    put_rounding(
        module, INPUT_ROUNDING, ActivationRounding(ActivationSpec.parse("i8/tensor/static"), torch.tensor(0.1))
    )
    g = graph(module, torch.randn(3, 64)).prepare(*BEFORE)
    assert not g.apply(RoundActivation(SPEC)).rewrites


def test_a_value_that_is_written_is_rounded_again(graph, siblings):

    def calls(x):
        q = siblings.q(x)
        x.add_(1)
        return q, siblings.k(x)

    x = torch.randn(3, 64)
    siblings.forward = calls  # type: ignore[method-assign]
    g = graph(siblings, x.clone()).prepare(*BEFORE)
    g.apply(RoundActivation(SPEC), rtol=0.1, atol=0.5)
    assert g.ops().count("round_activation") == 2


@pytest.mark.parametrize("spec", ["i8/row/sym", "u4/g32/asym"])
def test_model(tiny_llama, interpreted, spec):
    """The same logits as modules that round what they read."""
    model, tokens = tiny_llama(num_hidden_layers=1), torch.randint(0, 100, (2, 7))
    rounding_modules = qcompile.optimize(copy.deepcopy(model), spec, progress=False)
    for module in list(rounding_modules.modules()):
        if "weight" in packed_parameters(module):
            put_rounding(module, INPUT_ROUNDING, ActivationRounding(ActivationSpec.parse(SPEC)))
    with torch.no_grad():
        exact = qcompile.optimize(copy.deepcopy(model), spec, progress=False)(tokens).logits
        want = rounding_modules(tokens).logits
        rounded = qcompile.optimize(model, spec, activations=SPEC, progress=False)
        got = rounded(tokens).logits
    assert 1e-4 < (exact - want).norm() / want.norm() < 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    lowered = {low.op for low in qcompile.explain(rounded).outcomes[-1].lowered}
    assert "linear_w8a8" in lowered
