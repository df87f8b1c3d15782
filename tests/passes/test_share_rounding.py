"""share_rounding."""

import torch

from qcompile.normal import normalizing_passes
from qcompile.ops.activation_rounding import round_activation
from qcompile.passes.fuse_siblings import FuseSiblings
from qcompile.passes.quantize_linear import QuantizeLinear
from qcompile.passes.share_rounding import ShareRounding
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import INPUT_ROUNDING, OUTPUT_ROUNDING, put_rounding
from qcompile.stores import ActivationRounding

DYNAMIC = ActivationSpec.parse("i8/token/dynamic")
BEFORE = [rule for rule in normalizing_passes() if rule.name != "share_rounding"]


def test_text(graph, siblings, golden):
    for linear in (siblings.q, siblings.k):
        put_rounding(linear, INPUT_ROUNDING, ActivationRounding(DYNAMIC))
    g = graph(siblings, torch.randn(3, 64)).prepare(*BEFORE)
    before = g.text()
    g.apply(ShareRounding())
    golden("passes/share_rounding", f"{before}\nbecomes\n\n{g.text()}")


def test_siblings_are_fused_behind_it(graph, siblings):
    rounding = ActivationRounding(ActivationSpec.parse("i8/tensor/static"), torch.tensor(0.02))
    for linear in (siblings.q, siblings.k):
        put_rounding(linear, INPUT_ROUNDING, rounding)
        put_rounding(linear, OUTPUT_ROUNDING, ActivationRounding(DYNAMIC))
    g = graph(siblings, torch.randn(3, 64)).prepare(*normalizing_passes(), QuantizeLinear())
    assert len(g.apply(FuseSiblings()).rewrites) == 1
    assert g.ops() == ["round_activation", "linear", "narrow", "narrow", "round_activation", "round_activation"]


def test_what_differs_stays_apart(graph):
    def specs(x):
        return [round_activation(x, None, None, spec) for spec in ("i8/token/dynamic", "i8/token/dynamic/half")]

    def scales(x, a, b):
        return [round_activation(x, scale, None, "i8/tensor/static") for scale in (a, b)]

    x = torch.randn(3, 64)
    assert not graph(specs, x).apply(ShareRounding()).rewrites
    assert not graph(scales, x, torch.tensor(0.1), torch.tensor(0.2)).apply(ShareRounding()).rewrites


def test_a_value_written_between_two_roundings(graph):
    def function(x):
        y = x + 1
        first = round_activation(y, None, None, "i8/token/dynamic")
        y.mul_(2)
        return first, round_activation(y, None, None, "i8/token/dynamic")

    assert not graph(function, torch.randn(3, 64)).apply(ShareRounding()).rewrites
